// Autocast of the gathered convolution: floating inputs go to the dtype that the user chose for the device.
#include <ATen/autocast_mode.h>

#include "ops/gathered_conv2d.h"

namespace bap_kernels {
namespace {

template <c10::DeviceType kDevice, c10::DispatchKey kKey>
at::Tensor autocast(const GatheredConv2dArgs<c10::SymInt>& a) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  const at::Tensor input = at::autocast::cached_cast(dtype, a.input, kDevice);
  const at::Tensor weight = at::autocast::cached_cast(dtype, a.weight, kDevice);
  const OptionalTensor bias = at::autocast::cached_cast(dtype, a.bias, kDevice);
  // What is packed for a cast that lives for this call alone would never be found again.
  const bool lasting = weight.is_same(a.weight) || weight.use_count() > 1;
  return call<GatheredConv2d>({a.with_tensors(input, weight, bias), a.cache_packed && lasting});
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, AutocastCPU, m) {
  implement<GatheredConv2d, autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>>(m);
}

TORCH_LIBRARY_IMPL(bap_kernels, AutocastCUDA, m) {
  implement<GatheredConv2d, autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>>(m);
}

}  // namespace bap_kernels
