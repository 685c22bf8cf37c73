// Whether calling a kernel of the CPU directly is what PyTorch's dispatcher would do.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace bap_kernels {

// Whether nothing in this thread records or transforms calls: modes, torch.func, torch.jit.trace and whatever else adds
// a key of its own.
inline bool calls_are_plain() {
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return (included.raw_repr() & ~c10::default_included_set.raw_repr()) == 0;
}

// Whether besides autocast changes no dtype.
inline bool calls_keep_dtypes() { return calls_are_plain() && !at::autocast::is_autocast_enabled(at::kCPU); }

// Whether it is an ordinary tensor of this CPU that asks for no gradient.
inline bool is_plain_tensor(const at::Tensor& x) {
  constexpr c10::DispatchKeySet kPlain = c10::DispatchKeySet(
      {c10::DispatchKey::Dense, c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutogradCPU,
       c10::DispatchKey::AutogradFunctionality, c10::DispatchKey::AutocastCPU});
  if ((x.key_set().raw_repr() & ~kPlain.raw_repr()) != 0 || x._fw_grad(/*level=*/0).defined()) return false;
  return !x.requires_grad() || !c10::GradMode::is_enabled();
}

}  // namespace bap_kernels
