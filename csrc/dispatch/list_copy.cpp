// A call's own copies of channel lists.
#include "dispatch/list_copy.h"

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "dispatch/backend.h"
#include "dispatch/measured_device.h"

namespace bap_kernels {
namespace {

constexpr int64_t kFewestEntries = 256;
constexpr size_t kMostFree = 32;

std::vector<at::Tensor>& free_copies() {
  thread_local std::vector<at::Tensor> copies;
  return copies;
}

at::Tensor take(int64_t length) {
  auto& free = free_copies();
  at::Tensor copy;
  if (!free.empty()) {
    copy = std::move(free.back());
    free.pop_back();
  }
  if (!copy.defined() || static_cast<int64_t>(copy.storage().nbytes() / sizeof(int32_t)) < length) {
    // It serves inference and training alike.
    const c10::InferenceMode ordinary(false);
    copy = at::empty({std::max(length, kFewestEntries)}, at::TensorOptions().dtype(at::kInt));
  }
  copy.unsafeGetTensorImpl()->set_sizes_contiguous({length});
  return copy;
}

}  // namespace

ListCopy::ListCopy(const OptionalTensor& list) {
  if (!has_value(list)) return;
  // On a GPU, a simulated one too, `auto` may run an opt-in backend.
  const bool kept = on_gpu(*list) || named_opt_in_backend() != nullptr;
  if (!list->is_cpu() || list->scalar_type() != at::kInt || list->dim() != 1 || kept) {
    list_ = list;
    return;
  }
  const int64_t length = list->size(0), step = list->stride(0);
  at::Tensor copy = take(length);
  if (length > 0) {
    const auto* from = list->const_data_ptr<int32_t>();
    auto* to = copy.mutable_data_ptr<int32_t>();
    if (step == 1) {
      std::memcpy(to, from, length * sizeof(int32_t));
    } else {
      for (int64_t i = 0; i < length; ++i) to[i] = from[i * step];
    }
  }
  list_ = std::move(copy);
  own_ = true;
}

ListCopy::~ListCopy() {
  if (!own_ || list_->use_count() != 1) return;
  auto& free = free_copies();
  if (free.size() < kMostFree) free.push_back(std::move(*list_));
}

}  // namespace bap_kernels
