// Backward of the gathered convolution on the native kernels.
#include <ATen/ops/empty.h>

#include "backends/cpu/gradient_call.h"
#include "backends/cpu/native.h"
#include "ops/listed_channels.h"

namespace bap_kernels {
namespace {

OptionalTensor contiguous(const OptionalTensor& list) {
  return has_value(list) ? OptionalTensor(list->contiguous()) : std::nullopt;
}

}  // namespace

GradientTriple native_gathered_conv2d_backward(const ConvBackwardCall& c) {
  const OptionalTensor in_list = contiguous(c.in_index), out_list = contiguous(c.out_index);
  GradientCall call{
      c.grad_output,         c.input, c.weight, c.stride, c.padding, c.dilation, c.shape, list_pointer(in_list),
      list_pointer(out_list)};
  if (c.mask[0] || c.mask[1]) find_live_channels(call);
  const auto none = [&] { return at::empty({0}, c.input.options()); };
  GradientTriple grads{none(), none(), none()};
  if (c.mask[0]) {
    InputGradient gradient{call.in_index,
                           c.shape.kept_in,
                           nullptr,
                           /*store=*/true,
                           /*dots=*/false,
                           {},
                           {}};
    run_input_gradient(call, gradient);
    std::get<0>(grads) = gradient.grad_input;
  }
  if (c.mask[1]) std::get<1>(grads) = native_weight_gradient(call);
  if (c.mask[2]) std::get<2>(grads) = listed_bias_gradient(c.grad_output, out_list, c.shape.channels_out);
  return grads;
}

}  // namespace bap_kernels
