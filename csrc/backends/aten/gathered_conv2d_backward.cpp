// Backward of the gathered convolution through PyTorch's convolution on the listed slices.
//   dx[:, in] = conv_backward(dy, x[:, in], w[out, in]), zeros elsewhere;  dw[out, in] likewise;  db[out] = sum dy

#include "backends/aten/gathered_conv2d.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include "backends/aten/convolution.h"
#include "ops/listed_channels.h"

namespace bap_kernels {

GradientTriple aten_gathered_conv2d_backward(const ConvBackwardCall& c) {
  const auto& [grad_output, input, weight, in_index, out_index, stride, padding, dilation, groups, mask] =
      static_cast<const GatheredConv2dBackwardArgs<int64_t>&>(c);
  const ConvShape<int64_t>& s = c.shape;
  const auto none = [&input] { return at::empty({0}, input.options()); };
  at::Tensor grad_input = none(), grad_weight = none(), grad_bias = none();
  if (s.batch == 0 || s.kept_in == 0 || s.kept_out == 0) {
    if (mask[0]) grad_input = at::zeros_like(input);
    if (mask[1]) grad_weight = at::zeros_like(weight);
  } else if (mask[0] || mask[1]) {
    at::Tensor x = selected(input, 1, in_index);
    const at::Tensor w = selected(selected(weight, 0, out_index), 1, s.depthwise ? OptionalTensor() : in_index);
    std::array<int64_t, 2> pad = {padding[kTop], padding[kLeft]};
    const bool symmetric = padding[kTop] == padding[kBottom] && padding[kLeft] == padding[kRight];
    if (!symmetric) {
      x = at::constant_pad_nd(x, {padding[kLeft], padding[kRight], padding[kTop], padding[kBottom]});
      pad = {0, 0};
    }
    auto [dx, dw] = convolution_gradients(grad_output, x, w, {stride, pad, dilation, s.depthwise ? s.kept_in : 1},
                                          mask[0], mask[1]);
    if (mask[0]) {
      if (!symmetric) dx = dx.narrow(2, padding[kTop], s.height).narrow(3, padding[kLeft], s.width);
      grad_input = spread(dx, input, 1, in_index);
    }
    if (mask[1]) {
      if (!s.depthwise && has_value(in_index) && has_value(out_index)) {
        grad_weight = spread(spread(dw, weight.narrow(0, 0, s.kept_out), 1, in_index), weight, 0, out_index);
      } else if (has_value(out_index)) {
        grad_weight = spread(dw, weight, 0, out_index);
      } else {
        grad_weight = spread(dw, weight, 1, in_index);
      }
    }
  }
  if (mask[2]) grad_bias = listed_bias_gradient(grad_output, out_index, s.channels_out);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace bap_kernels
