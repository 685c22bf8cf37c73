// See tensor_state.h.
#include "dispatch/tensor_state.h"

namespace bap_kernels {
namespace {

uint32_t version_of(const at::Tensor& t) { return counts_writes(t) ? static_cast<uint32_t>(t._version()) : 0; }

}  // namespace

TensorState::TensorState(const at::Tensor& t)
    : impl(t.getIntrusivePtr()),
      // Without a strong reference on the way, which another thread could take for a second owner.
      storage(c10::weak_intrusive_ptr<c10::StorageImpl>::reclaim(
          static_cast<c10::StorageImpl*>(c10::raw::intrusive_ptr::make_weak(t.storage().unsafeGetStorageImpl())))),
      data(t.const_data_ptr()),
      version(version_of(t)) {}

bool TensorState::holds(const at::Tensor& t) const {
  return impl._unsafe_get_target() == t.unsafeGetTensorImpl() &&
         storage._unsafe_get_target() == t.storage().unsafeGetStorageImpl() && data == t.const_data_ptr() &&
         version == version_of(t);
}

}  // namespace bap_kernels
