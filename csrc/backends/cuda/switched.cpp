// The switched convolution on the CUDA kernels: a switch becomes a list and a count on the device, so that no call
// waits for it. The list holds all channels, those that are on first; the kernels stop at the count.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include "backends/cuda/routes.h"

namespace bap_kernels {
namespace {

struct OrderedSwitch {
  ListForm order;        // all channels, those that are on first, in increasing order each
  OptionalTensor count;  // how many are on, int32, (1,)
};

OrderedSwitch ordered(const at::Tensor& switches) {
  const at::Tensor off = switches.eq(0);
  const int64_t channels = switches.size(0);
  return {{off.argsort(/*stable=*/true, 0, /*descending=*/false).to(at::kInt), 1, channels},
          off.logical_not().sum(0, /*keepdim=*/true).to(at::kInt)};
}

}  // namespace

PlannedConv plan_switched(const SwitchedCall& c, const ListForm& order) {
  const auto& s = c.shape;
  ConvLaunch launch;
  launch.runs = {{{}, order, 0, s.batch}};
  launch.columns = s.channels_out;
  place_forward(launch, c.input, c.weight, s.out_h, s.out_w, c.stride, c.padding, c.dilation);
  const ConvPlan plan =
      plan_conv(launch, layout_of_new(c.format(), s.channels_out, s.out_h * s.out_w), /*prologue=*/false);
  return {std::move(launch), plan};
}

PlannedConv plan_switched_gradient(const SwitchedBackwardCall& c, const ListForm& order) {
  const auto& s = c.shape;
  ConvLaunch launch;
  launch.source = c.grad_output;
  launch.runs = {{{}, {std::nullopt, 0, s.channels_out}, 0, s.batch}};
  launch.result_list = order;
  launch.full_width = true;
  launch.columns = s.channels_in;
  launch.gradient = true;
  const auto axes = axes_of(c.input, c.weight, s.out_h, s.out_w, c.stride, c.padding, c.dilation);
  launch.h = axes[0];
  launch.w = axes[1];
  if (c.mask[kGradSwitch]) launch.grad_switch = c.switches;  // its place is known when it is made
  std::optional<ResultLayout> result;
  if (c.mask[kGradInput]) result = layout_of_like(c.input);
  const ConvPlan plan = plan_conv(launch, result, /*prologue=*/false, /*aligned=*/true);
  return {std::move(launch), plan};
}

at::Tensor cuda_switched_conv2d(const SwitchedCall& c) {
  const auto& s = c.shape;
  refuse_uncovered("switched_conv2d", c.input, c.weight, c.groups, s.out_h, s.out_w);
  const at::Tensor y =
      at::empty({s.batch, s.channels_out, s.out_h, s.out_w}, c.input.options().memory_format(c.format()));
  const OrderedSwitch on = ordered(c.switches);
  auto [launch, plan] = plan_switched(c, on.order);
  launch.result = y;
  launch.runs[0].weight = [&](WeightForm form) {
    return packed_weight(c.weight, {}, on.order.entries, /*by_input=*/false, form, on.count);
  };
  launch.bias = c.bias;
  launch.depth = on.count;
  launch_planned(launch, plan, on.count);
  return y;
}

SwitchedGradients cuda_switched_conv2d_backward(const SwitchedBackwardCall& c) {
  const auto& s = c.shape;
  const at::Tensor& grad_output = c.grad_output;
  const SwitchedMask& mask = c.mask;
  refuse_uncovered("switched_conv2d_backward", c.input, c.weight, c.groups, s.out_h, s.out_w);
  const auto none = [](const at::Tensor& like) { return at::empty({0}, like.options()); };
  SwitchedGradients grads{none(c.input), none(c.weight), none(c.weight), none(c.switches)};
  const OrderedSwitch on = ordered(c.switches);
  const auto axes = axes_of(c.input, c.weight, s.out_h, s.out_w, c.stride, c.padding, c.dilation);
  const bool any = mask[kGradInput] || mask[kGradWeight] || mask[kGradSwitch];
  const at::Tensor grad = any ? with_aligned_chunks(grad_output) : grad_output;
  if (mask[kGradInput] || mask[kGradSwitch]) {
    auto [launch, plan] = plan_switched_gradient(c, on.order);
    launch.runs[0].weight = [&](WeightForm form) {
      return packed_weight(c.weight, {}, on.order.entries, /*by_input=*/true, form);
    };
    launch.source = grad;
    launch.stored = on.count;
    if (mask[kGradInput]) {
      std::get<kGradInput>(grads) = at::empty_like(c.input);
      launch.result = std::get<kGradInput>(grads);
    }
    if (mask[kGradSwitch]) {
      std::get<kGradSwitch>(grads) = at::zeros_like(c.switches);
      launch.input = c.input;
      launch.grad_switch = std::get<kGradSwitch>(grads);
      launch.reduce_off = c.off_gradient;
    }
    launch_planned(launch, plan);
  }
  if (mask[kGradWeight]) {
    std::get<kGradWeight>(grads) = at::zeros_like(c.weight);
    run_weight_gradient(std::get<kGradWeight>(grads), grad, c.input, {std::nullopt, 0, s.channels_out}, on.order,
                        on.count, axes);
  }
  if (mask[kGradBias]) std::get<kGradBias>(grads) = grad_output.sum({0, 2, 3});
  return grads;
}

}  // namespace bap_kernels
