// Autocast of the switched convolution: input, weight and bias go to the dtype that the user chose for the device. The
// switch stays as it is: its gradient is a sum over the whole batch, which 16 bits would not hold.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "ops/switched_conv2d.h"

namespace bap_kernels {
namespace {

using c10::SymInt;
using c10::SymIntArrayRef;

template <c10::DeviceType kDevice, c10::DispatchKey kKey>
at::Tensor switched_conv2d_autocast(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                    const at::Tensor& switches, SymIntArrayRef stride, SymIntArrayRef padding,
                                    SymIntArrayRef dilation, SymInt groups, bool off_gradient,
                                    const OptionalTensor& read, int64_t reader) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("bap_kernels::switched_conv2d", "")
                       .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&,
                                         SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymInt, bool,
                                         const OptionalTensor&, int64_t)>();
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  return op.call(at::autocast::cached_cast(dtype, input, kDevice), at::autocast::cached_cast(dtype, weight, kDevice),
                 at::autocast::cached_cast(dtype, bias, kDevice), switches, stride, padding, dilation,
                 std::move(groups), off_gradient, read, reader);
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, AutocastCPU, m) {
  m.impl("switched_conv2d", switched_conv2d_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(bap_kernels, AutocastCUDA, m) {
  m.impl("switched_conv2d", switched_conv2d_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace bap_kernels
