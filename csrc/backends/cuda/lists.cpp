// The lists' forms, kept per list as long as it lives unchanged.
#include "backends/cuda/lists.h"

#include <ATen/ops/floor_divide.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>

#include "backends/cuda/launches.h"

namespace bap_kernels {
namespace {

struct KnownList {
  c10::weak_intrusive_ptr<c10::TensorImpl> list;
  const void* data;
  int64_t version;
  ListForm form;
};

// Never destroyed: tensors must not be freed after torch has shut down.
struct KnownLists {
  std::mutex mutex;
  std::unordered_map<const c10::TensorImpl*, KnownList> lists;
  size_t sweep_at = 64;
};
KnownLists& known_lists() {
  static auto* lists = new KnownLists();
  return *lists;
}

// Those of lists that are gone, whenever their number has doubled.
void sweep(KnownLists& known) {
  if (known.lists.size() < known.sweep_at) return;
  for (auto it = known.lists.begin(); it != known.lists.end();) {
    it = it->second.list.expired() ? known.lists.erase(it) : std::next(it);
  }
  known.sweep_at = 2 * known.lists.size() + 64;
}

}  // namespace

int64_t block_length(const int32_t* list, int64_t length) {
  for (const int64_t b : {32, 16, 8}) {
    bool whole = length > 0 && length % b == 0;
    for (int64_t i = 0; whole && i < length; ++i)
      whole = list[i] == list[i / b * b] + i % b && list[i / b * b] % b == 0;
    if (whole) return b;
  }
  return 1;
}

ListForm list_form(const OptionalTensor& index, int64_t channels, bool blocks) {
  if (!has_value(index)) return {std::nullopt, 0, channels};
  const int64_t length = index->size(0);
  if (!blocks || index->is_inference()) return {index->contiguous(), 1, length};
  KnownLists& known = known_lists();
  {
    std::lock_guard<std::mutex> lock(known.mutex);
    const auto it = known.lists.find(index->unsafeGetTensorImpl());
    // The weak reference keeps the address from being reused.
    if (it != known.lists.end() && it->second.version == index->_version() &&
        it->second.data == index->const_data_ptr()) {
      return it->second.form;
    }
  }
  if (capturing_cuda(*index)) return {index->contiguous(), 1, length};
  KnownList entry{c10::weak_intrusive_ptr<c10::TensorImpl>(index->getIntrusivePtr()),
                  index->const_data_ptr(),
                  index->_version(),
                  {}};
  const at::Tensor values = index->cpu().contiguous();
  const int64_t b = block_length(values.const_data_ptr<int32_t>(), length);
  // An ordinary tensor of its own: it is kept across inference and training alike.
  c10::InferenceMode ordinary(false);
  const at::Tensor entries = b == 1 ? index->detach().clone(at::MemoryFormat::Contiguous)
                                    : index->detach().slice(0, 0, length, b).floor_divide(b).contiguous();
  entry.form = {entries, b, length};
  const ListForm form = entry.form;
  std::lock_guard<std::mutex> lock(known.mutex);
  sweep(known);
  known.lists.insert_or_assign(index->unsafeGetTensorImpl(), std::move(entry));
  return form;
}

}  // namespace bap_kernels
