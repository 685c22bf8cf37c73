// The switched convolution on CUDA devices: through ATen, or the backend that is named, with the switch never read on
// the host, and `read` unused: no channel is left out. The private ops are ATen's way on CPUs too, so that machines
// without a GPU can test it.
#include <torch/library.h>

#include "backends/aten/switched_conv2d.h"
#include "dispatch/named_backend.h"

namespace bap_kernels {
namespace {

at::Tensor run_masked(const SwitchedCall& call) { return masked_switched_conv2d(call); }

at::Tensor run_named(const SwitchedCall& call) {
  const NamedBackend* named = call.trivial() ? nullptr : named_backend();
  return named != nullptr ? named->switched(call) : run_masked(call);
}

SwitchedGradients run_masked_backward(const SwitchedCall& call, const at::Tensor& grad_output, SwitchedMask mask) {
  return masked_switched_conv2d_backward(call, grad_output, mask);
}

SwitchedGradients run_named_backward(const SwitchedCall& call, const at::Tensor& grad_output, SwitchedMask mask) {
  const NamedBackend* named = call.trivial() ? nullptr : named_backend();
  return named != nullptr ? named->switched_backward(call, grad_output, mask)
                          : run_masked_backward(call, grad_output, mask);
}

template <at::Tensor (*run)(const SwitchedCall&)>
at::Tensor checked_forward(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                           const at::Tensor& switches, c10::IntArrayRef stride, c10::IntArrayRef padding,
                           c10::IntArrayRef dilation, int64_t groups, bool off_gradient, const OptionalTensor& read,
                           int64_t) {
  const char* op = "switched_conv2d";
  const auto s = check_switched_conv2d<int64_t>(op, input, weight, bias, switches, stride, padding, dilation, groups);
  check_read<int64_t>(op, read, s, input);
  return run({input, weight, bias, switches, stride, padding, dilation, groups, off_gradient, s});
}

template <SwitchedGradients (*run)(const SwitchedCall&, const at::Tensor&, SwitchedMask)>
SwitchedGradients checked_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                                   const at::Tensor& switches, c10::IntArrayRef stride, c10::IntArrayRef padding,
                                   c10::IntArrayRef dilation, int64_t groups, bool off_gradient, SwitchedMask mask,
                                   const OptionalTensor& read, int64_t) {
  const char* op = "switched_conv2d_backward";
  const OptionalTensor no_bias;
  const auto s =
      check_switched_conv2d<int64_t>(op, input, weight, no_bias, switches, stride, padding, dilation, groups);
  check_grad_output<int64_t>(op, grad_output, s, input);
  check_read<int64_t>(op, read, s, input);
  return run({input, weight, no_bias, switches, stride, padding, dilation, groups, off_gradient, s}, grad_output, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, CUDA, m) {
  m.impl("switched_conv2d", checked_forward<run_named>);
  m.impl("switched_conv2d_backward", checked_backward<run_named_backward>);
  m.impl("_switched_conv2d_masked", checked_forward<run_masked>);
  m.impl("_switched_conv2d_masked_backward", checked_backward<run_masked_backward>);
}

TORCH_LIBRARY_IMPL(bap_kernels, CPU, m) {
  m.impl("_switched_conv2d_masked", checked_forward<run_masked>);
  m.impl("_switched_conv2d_masked_backward", checked_backward<run_masked_backward>);
}

}  // namespace bap_kernels
