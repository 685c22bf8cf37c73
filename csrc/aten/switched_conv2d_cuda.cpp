// The switched convolution on CUDA devices: through ATen, with the switch never read on the host. The private ops are
// the same on CPUs too, so that machines without a GPU can test it.
#include <torch/library.h>

#include "aten/switched_conv2d.h"

namespace bap_kernels {
namespace {

at::Tensor switched_conv2d_masked(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                  const at::Tensor& switches, c10::IntArrayRef stride, c10::IntArrayRef padding,
                                  c10::IntArrayRef dilation, int64_t groups, bool off_gradient) {
  return masked_switched_conv2d({input, weight, bias, switches, stride, padding, dilation, groups, off_gradient,
                                 check_switched_conv2d<int64_t>("switched_conv2d", input, weight, bias, switches,
                                                                stride, padding, dilation, groups)});
}

SwitchedGradients switched_conv2d_masked_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                                  const at::Tensor& weight, const at::Tensor& switches,
                                                  c10::IntArrayRef stride, c10::IntArrayRef padding,
                                                  c10::IntArrayRef dilation, int64_t groups, bool off_gradient,
                                                  SwitchedMask mask) {
  const char* op = "switched_conv2d_backward";
  const OptionalTensor no_bias;
  const auto s =
      check_switched_conv2d<int64_t>(op, input, weight, no_bias, switches, stride, padding, dilation, groups);
  check_grad_output<int64_t>(op, grad_output, s, input);
  return masked_switched_conv2d_backward(
      {input, weight, no_bias, switches, stride, padding, dilation, groups, off_gradient, s}, grad_output, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, CUDA, m) {
  m.impl("switched_conv2d", switched_conv2d_masked);
  m.impl("switched_conv2d_backward", switched_conv2d_masked_backward);
  m.impl("_switched_conv2d_masked", switched_conv2d_masked);
  m.impl("_switched_conv2d_masked_backward", switched_conv2d_masked_backward);
}

TORCH_LIBRARY_IMPL(bap_kernels, CPU, m) {
  m.impl("_switched_conv2d_masked", switched_conv2d_masked);
  m.impl("_switched_conv2d_masked_backward", switched_conv2d_masked_backward);
}

}  // namespace bap_kernels
