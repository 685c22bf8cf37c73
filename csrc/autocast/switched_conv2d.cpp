// Autocast of the switched convolution: input, weight and bias go to the dtype that the user chose for the device. The
// switch stays as it is: its gradient is a sum over the whole batch, which 16 bits would not hold.
#include <ATen/autocast_mode.h>

#include "ops/switched_conv2d.h"

namespace bap_kernels {
namespace {

template <c10::DeviceType kDevice, c10::DispatchKey kKey>
at::Tensor autocast(const SwitchedConv2dArgs<c10::SymInt>& a) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  const at::Tensor input = at::autocast::cached_cast(dtype, a.input, kDevice);
  const at::Tensor weight = at::autocast::cached_cast(dtype, a.weight, kDevice);
  const OptionalTensor bias = at::autocast::cached_cast(dtype, a.bias, kDevice);
  return call<SwitchedConv2d>(a.with_tensors(input, weight, bias));
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, AutocastCPU, m) {
  implement<SwitchedConv2d, autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>>(m);
}

TORCH_LIBRARY_IMPL(bap_kernels, AutocastCUDA, m) {
  implement<SwitchedConv2d, autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>>(m);
}

}  // namespace bap_kernels
