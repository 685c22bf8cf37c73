// Schemas of the gathered convolution's ops and their Meta kernels (shapes, dtypes and strides without data).
#include "ops/gathered_conv2d.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace bap_kernels {
namespace {

using c10::SymInt;
using c10::SymIntArrayRef;

at::Tensor empty_result(const ConvShape<SymInt>& s, const at::Tensor& input) {
  const std::array<SymInt, 4> sizes = {s.batch, s.kept_out, s.out_h, s.out_w};
  return at::empty_symint(sizes, input.options().memory_format(input.suggest_memory_format()));
}

at::Tensor gathered_conv2d_meta(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& in_index, const OptionalTensor& out_index, SymIntArrayRef stride,
                                SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups, bool) {
  return empty_result(check_gathered_conv2d<SymInt>("gathered_conv2d", input, weight, bias, in_index, out_index, stride,
                                                    padding, dilation, groups),
                      input);
}

at::Tensor fused_meta(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& in_index, const OptionalTensor& out_index, SymIntArrayRef stride,
                      SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups, const OptionalTensor& in_scale,
                      const OptionalTensor& in_shift, bool in_relu, const OptionalTensor& out_scale,
                      const OptionalTensor& out_shift, const OptionalTensor& residual, bool out_relu, bool,
                      const OptionalTensor& weight_index) {
  const auto s = check_gathered_conv2d_fused<SymInt>(
      "_gathered_conv2d_fused", input, weight, bias, in_index, out_index, stride, padding, dilation, groups,
      {in_scale, in_shift, in_relu, out_scale, out_shift, residual, out_relu}, weight_index);
  return empty_result(s, input);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_meta(const at::Tensor& grad_output, const at::Tensor& input,
                                                             const at::Tensor& weight, const OptionalTensor& in_index,
                                                             const OptionalTensor& out_index, SymIntArrayRef stride,
                                                             SymIntArrayRef padding, SymIntArrayRef dilation,
                                                             SymInt groups, std::array<bool, 3> mask) {
  const char* op = "gathered_conv2d_backward";
  const auto s =
      check_gathered_conv2d<SymInt>(op, input, weight, {}, in_index, out_index, stride, padding, dilation, groups);
  check_grad_output<SymInt>(op, grad_output, s, input);
  const auto none = [&] { return at::empty({0}, input.options().memory_format(std::nullopt)); };
  return {mask[0] ? at::empty_like(input) : none(), mask[1] ? at::empty_like(weight) : none(),
          mask[2] ? at::empty_symint({weight.sym_size(0)}, weight.options().memory_format(std::nullopt)) : none()};
}

}  // namespace

TORCH_LIBRARY(bap_kernels, m) {
  m.def(
      "gathered_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? in_index, Tensor? out_index, "
      "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool cache_packed=False) -> Tensor");
  m.def(
      "gathered_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? in_index, Tensor? out_index, "
      "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool[3] output_mask) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "_gathered_conv2d_fused(Tensor input, Tensor weight, Tensor? bias, Tensor? in_index, Tensor? out_index, "
      "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, Tensor? in_scale, Tensor? in_shift, "
      "bool in_relu, Tensor? out_scale, Tensor? out_shift, Tensor? residual, bool out_relu, bool cache_packed=False, "
      "Tensor? weight_index=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(bap_kernels, Meta, m) {
  m.impl("gathered_conv2d", gathered_conv2d_meta);
  m.impl("gathered_conv2d_backward", backward_meta);
  m.impl("_gathered_conv2d_fused", fused_meta);
}

}  // namespace bap_kernels
