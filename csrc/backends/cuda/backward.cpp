// Routes of the gradients on the CUDA kernels.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include "backends/cuda/routes.h"
#include "ops/listed_channels.h"

namespace bap_kernels {

PlannedConv plan_input_gradient(const ConvBackwardCall& c, const ResultLayout& result) {
  const auto& s = c.shape;
  ConvLaunch launch;
  launch.source = c.grad_output;
  launch.runs = {{{}, {std::nullopt, 0, c.grad_output.size(1)}, 0, s.batch}};
  launch.result_list = list_form(c.in_index, s.channels_in);
  launch.full_width = has_value(c.in_index);
  launch.columns = launch.result_list.length;
  const auto axes = axes_of(c.input, c.weight, s.out_h, s.out_w, c.stride, c.padding, c.dilation);
  launch.h = axes[0];
  launch.w = axes[1];
  // A pointwise convolution's gradient is a pointwise convolution with the lists changed over.
  launch.gradient = !pointwise(axes);
  ConvPlan plan = plan_conv(launch, result, /*prologue=*/false);
  plan.families |= family(CudaKernel::kInputGradient, math_of(c.input));
  return {std::move(launch), plan};
}

at::Tensor with_aligned_chunks(const at::Tensor& t) {
  return aligned_chunks(t, false) ? t : packed_channels(t, {std::nullopt, 0, t.size(1)});
}

void run_weight_gradient(const at::Tensor& result, const at::Tensor& grad, const at::Tensor& input,
                         const ListForm& rows, const ListForm& columns, const OptionalTensor& used,
                         const std::array<ConvAxis, 2>& axes) {
  const WeightGradientPlan plan = plan_weight_gradient(grad, input, rows.length, columns);
  const at::Tensor source = plan.packs_input ? packed_channels(input, columns, used) : input;
  const ListForm read = plan.packs_input ? ListForm{std::nullopt, 0, columns.length} : columns;
  launch_weight_gradient(result, with_aligned_chunks(grad), source, read, rows, columns, used, axes[0], axes[1]);
}

GradientTriple cuda_gathered_conv2d_backward(const ConvBackwardCall& c) {
  const auto& [grad_output, input, weight, in_index, out_index, stride, padding, dilation, groups, mask] =
      static_cast<const GatheredConv2dBackwardArgs<int64_t>&>(c);
  const int64_t out_h = c.shape.out_h, out_w = c.shape.out_w;
  refuse_uncovered(GatheredConv2dBackward::kName, input, weight, groups, out_h, out_w);
  const auto none = [&input] { return at::empty({0}, input.options()); };
  GradientTriple grads{none(), none(), none()};
  const auto axes = axes_of(input, weight, out_h, out_w, stride, padding, dilation);
  if (mask[0]) {
    const at::Tensor dx = at::empty_like(input);
    auto [launch, plan] = plan_input_gradient(c, layout_of(dx));
    launch.result = dx;
    launch.runs[0].weight = [&c](WeightForm form) {
      return packed_weight(c.weight, c.out_index, c.in_index, /*by_input=*/true, form);
    };
    launch_planned(launch, plan);
    std::get<0>(grads) = dx;
  }
  if (mask[1]) {
    const bool all = !has_value(in_index) && !has_value(out_index);
    const at::Tensor dw = all ? at::empty_like(weight) : at::zeros_like(weight);
    run_weight_gradient(dw, grad_output, input, list_form(out_index, weight.size(0)),
                        list_form(in_index, input.size(1)), {}, axes);
    std::get<1>(grads) = dw;
  }
  if (mask[2]) std::get<2>(grads) = listed_bias_gradient(grad_output, out_index, weight.size(0));
  return grads;
}

}  // namespace bap_kernels
