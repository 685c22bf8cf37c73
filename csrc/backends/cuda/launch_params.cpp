// See launch_params.h.
#include "backends/cuda/launch_params.h"

#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <string>

#include "dispatch/pack_weight.h"

namespace bap_kernels {
namespace {

const CudaLauncher* known_launcher = nullptr;

void* current_stream(const at::Tensor& t) {
  if (!t.is_cuda()) return nullptr;
  return c10::impl::VirtualGuardImpl(t.device().type()).getStream(t.device()).native_handle();
}

std::string shape_text(const at::Tensor& t) {
  std::string text = "(";
  for (const int64_t size : t.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

}  // namespace

const CudaLauncher* cuda_launcher() { return known_launcher; }

void set_cuda_launcher(const CudaLauncher* given) {
  TORCH_CHECK(given->layout == kLauncherLayout, "bap_kernels._C_cuda was built from other sources than bap_kernels._C");
  known_launcher = given;
}

const CudaLauncher& launcher() {
  TORCH_INTERNAL_ASSERT(known_launcher != nullptr);
  return *known_launcher;
}

OnDevice::OnDevice(const at::Tensor& t)
    : guard(t.is_cuda() ? std::optional(t.device()) : std::nullopt),
      stream(current_stream(t)),
      index(t.is_cuda() ? t.get_device() : 0) {}

DeviceFacts device_facts(const at::Tensor& t) {
  const OnDevice on(t);
  return {launcher().sm_count(on.index), launcher().has_warpgroups(on.index)};
}

void check_launch(Status status, const char* kernel, const at::Tensor& source, const at::Tensor& other) {
  TORCH_CHECK(status == 0, "the CUDA kernel ", kernel, " did not launch for shapes ", shape_text(source), " and ",
              shape_text(other), ": ", launcher().status_text(status), ".");
}

MathMode products_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kBFloat16:
      return MathMode::kBFloat16;
    case at::kHalf:
      return MathMode::kHalf;
    default:
      return MathMode::kTf32;
  }
}

Strides strides_of(const at::Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

Strides copied_strides(const at::Tensor& t) {
  const auto along = [&t](int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); };
  return {along(0), along(1), along(2), along(3)};
}

ListParams list_params(const ListForm& list) {
  if (!has_value(list.entries)) return {nullptr, 0, 0};
  int shift = 0;
  while (int64_t{1} << shift < list.block) ++shift;
  TORCH_INTERNAL_ASSERT(int64_t{1} << shift == list.block);
  return {list.entries->const_data_ptr<int32_t>(), static_cast<int>(list.block), shift};
}

VectorParams vector_params(const OptionalTensor& t) {
  if (!has_value(t)) return {nullptr, false};
  return {t->const_data_ptr(), t->scalar_type() == at::kFloat};
}

const int32_t* count_pointer(const OptionalTensor& t) { return has_value(t) ? t->const_data_ptr<int32_t>() : nullptr; }

OptionalTensor dense(const OptionalTensor& vector) {
  return has_value(vector) ? OptionalTensor(vector->contiguous()) : std::nullopt;
}

at::Tensor new_floats(at::IntArrayRef sizes, const at::Tensor& like) {
  return at::empty(sizes, like.options().dtype(at::kFloat));
}

at::Tensor new_copy(const at::Tensor& t, int64_t channels) {
  return at::empty({t.size(0), t.size(2), t.size(3), packed_length(channels)}, t.options().memory_format(std::nullopt))
      .permute({0, 3, 1, 2});
}

bool aligned_chunks(const at::Tensor& t, bool planes) {
  const int64_t vector = 16 / static_cast<int64_t>(t.element_size());
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 != 0) return false;
  for (int64_t d = 0; d < 4; ++d) {
    const bool inner = planes ? d >= 2 : d == 1;
    if (!inner && t.size(d) > 1 && t.stride(d) % vector != 0) return false;
  }
  if (!planes) return t.stride(1) == 1;
  return t.stride(3) == 1 && (t.size(2) == 1 || t.stride(2) == t.size(3));
}

void for_chunks(const std::vector<LaunchRun>& runs, c10::function_ref<void(size_t, size_t, int)> body) {
  for (size_t first = 0; first < runs.size(); first += kMaxRuns) {
    const size_t last = std::min(runs.size(), first + kMaxRuns);
    int64_t images = 0;
    for (size_t i = first; i < last; ++i) images += runs[i].images;
    body(first, last, static_cast<int>(images));
  }
}

void for_launches(const std::vector<LaunchRun>& runs, c10::function_ref<void(const Runs&, size_t, int)> body) {
  for_chunks(runs, [&](size_t first, size_t last, int images) {
    Runs part{};
    for (size_t i = first; i < last; ++i) {
      const LaunchRun& run = runs[i];
      BatchRun& to = part.of[part.count++];
      to.list = list_params(run.list);
      to.depth = static_cast<int>(run.list.length);
      to.first = static_cast<int>(run.first);
      to.images = static_cast<int>(run.images);
    }
    body(part, first, images);
  });
}

}  // namespace bap_kernels
