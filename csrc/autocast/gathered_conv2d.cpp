// Autocast of the gathered convolution: floating inputs go to the dtype that the user chose for the device.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "ops/gathered_conv2d.h"

namespace bap_kernels {
namespace {

using c10::SymInt;
using c10::SymIntArrayRef;

template <c10::DeviceType kDevice, c10::DispatchKey kKey>
at::Tensor gathered_conv2d_autocast(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                    const OptionalTensor& in_index, const OptionalTensor& out_index,
                                    SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                                    SymInt groups, bool cache_packed) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  static auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("bap_kernels::gathered_conv2d", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                            const OptionalTensor&, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymInt, bool)>();
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  const at::Tensor cast = at::autocast::cached_cast(dtype, weight, kDevice);
  // What is packed for a cast that lives for this call alone would never be found again.
  const bool lasting = cast.is_same(weight) || cast.use_count() > 1;
  return op.call(at::autocast::cached_cast(dtype, input, kDevice), cast,
                 at::autocast::cached_cast(dtype, bias, kDevice), in_index, out_index, stride, padding, dilation,
                 std::move(groups), cache_packed && lasting);
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, AutocastCPU, m) {
  m.impl("gathered_conv2d", gathered_conv2d_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(bap_kernels, AutocastCUDA, m) {
  m.impl("gathered_conv2d", gathered_conv2d_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace bap_kernels
