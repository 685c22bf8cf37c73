// What the launchers share: tensors of the stable ABI as kernel parameters, the device and its stream, errors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "backends/cuda/kernels/launch.h"
#include "backends/cuda/ops/options.h"

namespace bap_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalStable = std::optional<Tensor>;

// Tensors of a simulation are on the CPU, and so are its ops.
#if defined(BAP_KERNELS_SIMULATED)
#define BAP_KERNELS_DEVICE_KEY CPU
#else
#define BAP_KERNELS_DEVICE_KEY CUDA
#endif

inline bool is_there(const OptionalStable& t) { return t.has_value() && t->defined(); }

inline std::string shape_text(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

// Makes the device of the tensors current as long as it lives, and knows its current stream.
class OnDevice {
 public:
#if defined(BAP_KERNELS_SIMULATED)
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
  }
#endif
  int device() const { return device_; }
  void* stream() const { return stream_; }

 private:
  int32_t device_ = 0;
  void* stream_ = nullptr;
#if !defined(BAP_KERNELS_SIMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline void check_launch(Status status, const char* op, const char* kernel, const Tensor& source, const Tensor& other) {
  STD_TORCH_CHECK(status == 0, op, "(): the kernel ", kernel, " did not launch for shapes ", shape_text(source),
                  " and ", shape_text(other), ": ", status_text(status), ".");
}

inline Products products_of(const Tensor& t, bool tf32, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return Products::kBFloat16;
    case ScalarType::Half:
      return Products::kHalf;
    case ScalarType::Float:
      return tf32 ? Products::kTf32 : Products::kFloat32;
    default:
      STD_TORCH_CHECK(false, op, "(): expected float32, float16 or bfloat16.");
  }
}

inline Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

inline ListParams list_params(const OptionalStable& entries, int64_t block) {
  if (!is_there(entries)) return {nullptr, 0};
  return {static_cast<const int32_t*>(entries->const_data_ptr()), static_cast<int>(block)};
}

inline VectorParams vector_params(const OptionalStable& t) {
  if (!is_there(t)) return {nullptr, false};
  return {t->const_data_ptr(), t->scalar_type() == ScalarType::Float};
}

inline const int32_t* count_pointer(const OptionalStable& t) {
  return is_there(t) ? static_cast<const int32_t*>(t->const_data_ptr()) : nullptr;
}

// Whether every run of 16 bytes along the axis of stride 1 starts on 16 bytes: channels, or the pixels of planes.
inline bool chunks_are_aligned(const Tensor& t, bool planes) {
  const int64_t vector = kChunkBytes / static_cast<int64_t>(t.element_size());
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kChunkBytes != 0) return false;
  for (int64_t d = 0; d < 4; ++d) {
    const bool inner = planes ? d >= 2 : d == 1;
    if (!inner && t.size(d) > 1 && t.stride(d) % vector != 0) return false;
  }
  if (!planes) return t.stride(1) == 1;
  return t.stride(3) == 1 && (t.size(2) == 1 || t.stride(2) == t.size(3));
}

inline Tensor new_floats(std::initializer_list<int64_t> sizes, const Tensor& like) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, ScalarType::Float, std::nullopt, like.device());
}

}  // namespace bap_kernels
