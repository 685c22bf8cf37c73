// Backward of the gathered convolution on CPUs: checks, then the native kernels or the ATen path.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "backends/aten/gathered_conv2d_backward.h"
#include "backends/cpu/gradient_call.h"
#include "dispatch/choice.h"
#include "dispatch/list_copy.h"
#include "dispatch/named_backend.h"

namespace bap_kernels {
namespace {

OptionalTensor contiguous(const OptionalTensor& list) {
  return has_value(list) ? OptionalTensor(list->contiguous()) : std::nullopt;
}

GradientTriple native_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                               const OptionalTensor& in_index, const OptionalTensor& out_index, c10::IntArrayRef stride,
                               c10::IntArrayRef padding, c10::IntArrayRef dilation, const ConvShape<int64_t>& s,
                               std::array<bool, 3> mask) {
  const OptionalTensor in_list = contiguous(in_index), out_list = contiguous(out_index);
  GradientCall call{grad_output,           input, weight, stride, padding, dilation, s, list_pointer(in_list),
                    list_pointer(out_list)};
  if (mask[0] || mask[1]) find_live_channels(call);
  const auto none = [&] { return at::empty({0}, input.options()); };
  GradientTriple grads{none(), none(), none()};
  if (mask[0]) {
    InputGradient wish{call.in_index, s.kept_in, nullptr, true, false, {}, {}};
    run_input_gradient(call, wish);
    std::get<0>(grads) = wish.grad_input;
  }
  if (mask[1]) std::get<1>(grads) = native_weight_gradient(call);
  if (mask[2]) std::get<2>(grads) = listed_bias_gradient(grad_output, out_list, s);
  return grads;
}

GradientTriple gathered_conv2d_backward_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                                            const at::Tensor& weight, const OptionalTensor& in_index,
                                            const OptionalTensor& out_index, c10::IntArrayRef stride,
                                            c10::IntArrayRef padding, c10::IntArrayRef dilation, int64_t groups,
                                            std::array<bool, 3> mask) {
  const char* op = "gathered_conv2d_backward";
  const ListCopy in_copy(in_index), out_copy(out_index);
  const OptionalTensor &in_list = in_copy.get(), &out_list = out_copy.get();
  const auto s =
      check_gathered_conv2d<int64_t>(op, input, weight, {}, in_list, out_list, stride, padding, dilation, groups);
  check_grad_output<int64_t>(op, grad_output, s, input);
  check_list_values(op, in_list, out_list, s.channels_in, s.channels_out, s.depthwise);
  const std::string& backend = get_backend();
  const bool trivial = s.batch == 0 || s.kept_in == 0 || s.kept_out == 0 || s.out_h == 0 || s.out_w == 0;
  if (const NamedBackend* named = trivial ? nullptr : named_backend()) {
    return named->backward(grad_output, input, weight, in_list, out_list, stride, padding, dilation, groups, mask);
  }
  const std::string reason = backend == "aten" ? "" : native_gradient_why_not(input, s);
  TORCH_CHECK_NOT_IMPLEMENTED(backend != "native" || reason.empty() || trivial, op,
                              "(): expected a call that backend `native` can run, got one that it cannot: ", reason,
                              ". Hint: use_backend(\"auto\") takes the ATen path where native cannot run.");
  const auto run = backend == "aten" || !reason.empty() ? aten_gathered_conv2d_backward : native_backward;
  return run(grad_output, input, weight, in_list, out_list, stride, padding, dilation, s, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(bap_kernels, CPU, m) { m.impl("gathered_conv2d_backward", gathered_conv2d_backward_cpu); }

}  // namespace bap_kernels
