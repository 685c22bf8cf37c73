// A tensor by identity, with what shows that it was written to or got other memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>

namespace bap_kernels {

// Whether PyTorch counts the writes to a tensor. It does not for those of inference mode, nor for one that was made
// there and has been given other data since.
inline bool counts_writes(const at::Tensor& t) {
  return !t.is_inference() && t.unsafeGetTensorImpl()->version_counter().enabled();
}

// The weak references keep the addresses from being reused.
struct TensorState {
  c10::weak_intrusive_ptr<c10::TensorImpl> impl;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  const void* data;
  uint32_t version;

  explicit TensorState(const at::Tensor& t);
  bool holds(const at::Tensor& t) const;
  bool expired() const { return impl.expired(); }
};

}  // namespace bap_kernels
