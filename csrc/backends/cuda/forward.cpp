// Routes of the forward on the CUDA kernels.
#include <algorithm>

#include "backends/cuda/routes.h"

namespace bap_kernels {
namespace {

// The run of a call's images, of which the first has number `first` in the batch.
LaunchRun forward_run(const ConvCall& c, int64_t first) {
  return {{}, list_form(c.in_index, c.shape.channels_in), first, c.shape.batch};
}

struct PlacedRun {
  const MixedRun* run;
  int64_t first, length;
};

// The blocks with the longest sums start first, so that none of them is left for the end.
std::vector<PlacedRun> longest_first(const MixedCall& c) {
  std::vector<PlacedRun> runs;
  int64_t first = 0;
  for (const MixedRun& run : c.runs) {
    runs.push_back({&run, first, has_value(run.in_index) ? run.in_index->size(0) : c.shape.channels_in});
    first += run.input.size(0);
  }
  std::stable_sort(runs.begin(), runs.end(),
                   [](const PlacedRun& a, const PlacedRun& b) { return a.length > b.length; });
  return runs;
}

}  // namespace

void launch_planned(ConvLaunch& launch, const ConvPlan& plan, const OptionalTensor& used, const Fusion& prologue) {
  launch.route = plan.route;
  if (plan.route == ConvRoute::kHalo) {
    launch.source_scale = prologue.in_scale;
    launch.source_shift = prologue.in_shift;
    launch.source_relu = prologue.in_relu;
  }
  if (plan.packs) {
    launch.source = packed_channels(launch.source, launch.runs, used, prologue);
    for (LaunchRun& run : launch.runs) run.list = {std::nullopt, 0, run.list.length};
  }
  launch_conv_into_result(launch, plan.spreads);
}

PlannedConv plan_forward(const ConvCall& c) {
  const auto& s = c.shape;
  ConvLaunch launch;
  launch.runs = {forward_run(c, 0)};
  launch.columns = s.kept_out;
  place_forward(launch, c.input, c.weight, s.out_h, s.out_w, c.stride, c.padding, c.dilation);
  const ConvPlan plan =
      plan_conv(launch, layout_of_new(c.format(), s.kept_out, s.out_h * s.out_w), c.fusion.has_prologue());
  return {std::move(launch), plan};
}

PlannedConv plan_mixed(const MixedCall& c) {
  const auto& s = c.shape;
  ConvLaunch launch;
  launch.columns = s.channels_out;
  for (const PlacedRun& run : longest_first(c)) launch.runs.push_back(forward_run(c.call(*run.run), run.first));
  place_forward(launch, c.input, c.weight, s.out_h, s.out_w, c.stride, c.padding, c.dilation);
  const ConvPlan plan = plan_conv(launch, layout_of(c.output), /*prologue=*/false);
  return {std::move(launch), plan};
}

at::Tensor cuda_gathered_conv2d(const ConvCall& c, const char* op) {
  const auto& s = c.shape;
  refuse_uncovered(op, c.input, c.weight, c.groups, s.out_h, s.out_w);
  auto [launch, plan] = plan_forward(c);
  const at::Tensor y = c.empty_result();
  const Fusion& f = c.fusion;
  launch.result = y;
  launch.runs[0].weight = [&c](WeightForm form) { return packed_weight(c, form); };
  // The bias is full-size; nothing else asks for the channels' numbers.
  launch.result_list = has_value(c.bias) ? list_form(c.out_index, s.channels_out) : ListForm{};
  launch.bias = c.bias;
  launch.scale = f.out_scale;
  launch.shift = f.out_shift;
  launch.residual = f.residual;
  launch.relu = f.out_relu;
  if (c.dual_store != nullptr && c.dual_store_index->size(0) > 0) {
    launch.copy_list = c.dual_store_index->contiguous();
    launch.copy = c.dual_store;
    launch.copy_format = c.format();
  }
  launch_planned(launch, plan, {}, f);
  return y;
}

void cuda_gathered_conv2d_mixed(const MixedCall& c, const char* op) {
  if (c.output.numel() == 0) return;
  const auto& s = c.shape;
  refuse_uncovered(op, c.input, c.weight, /*groups=*/1, s.out_h, s.out_w);
  auto [launch, plan] = plan_mixed(c);
  launch.result = c.output;
  launch.bias = c.bias;
  size_t i = 0;
  for (const PlacedRun& run : longest_first(c)) {
    launch.runs[i++].weight = [&c, of = run.run](WeightForm form) { return packed_weight(c.call(*of), form); };
  }
  launch_planned(launch, plan);
}

void place_forward(ConvLaunch& launch, const at::Tensor& input, const at::Tensor& weight, int64_t out_h, int64_t out_w,
                   c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation) {
  at::Tensor x = input;
  std::array<int64_t, 2> step = {stride[0], stride[1]};
  const bool single_tap = weight.size(2) == 1 && weight.size(3) == 1;
  const bool padded = padding[0] != 0 || padding[1] != 0 || padding[2] != 0 || padding[3] != 0;
  if (single_tap && !padded && (step[0] != 1 || step[1] != 1)) {
    x = x.slice(2, 0, std::nullopt, step[0]).slice(3, 0, std::nullopt, step[1]);
    step = {1, 1};
  }
  const auto axes = axes_of(x, weight, out_h, out_w, step, padding, dilation);
  launch.source = x;
  launch.h = axes[0];
  launch.w = axes[1];
}

}  // namespace bap_kernels
