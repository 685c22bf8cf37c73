// Routes of the forward on the CUDA kernels.
#include <ATen/ops/empty.h>

#include <algorithm>

#include "backends/cuda/kernels/halo_shape.h"
#include "backends/cuda/routes.h"
#include "dispatch/packed_cache.h"

namespace bap_kernels {
namespace {

// Whether the kernel with a halo takes a forward as it lies.
bool takes_halo(const ConvLaunch& l) {
  if (l.gradient || l.full_width || !has_value(l.result)) return false;
  ConvParams p{};
  const at::Tensor& x = l.source;
  p.source_stride = {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  p.axis_h = l.h;
  p.axis_w = l.w;
  for (const LaunchRun& run : l.runs) {
    p.runs.of[0].depth = std::max(p.runs.of[0].depth, static_cast<int>(run.list.length));
  }
  p.runs.count = 1;
  p.batch = static_cast<int>(x.size(0));
  p.columns = static_cast<int>(l.columns);
  const auto address = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  // Whether a tile fits is independent of the number of SMs.
  return choose_halo(halo_case(p, address, static_cast<int>(x.element_size())), 1).fits;
}

// The run of a call's images, of which the first has number `first` in the batch.
LaunchRun forward_run(const ConvCall& c, int64_t first) {
  const at::Tensor weight = PackedCache::instance().get(c, PackedKind::kByFilter, 0, [&] {
    return packed_weight(c.weight, c.out_index, c.weight_list(), /*by_input=*/false);
  });
  return {weight, list_form(c.in_index, c.shape.channels_in), first, c.shape.batch};
}

}  // namespace

void run_conv_route(ConvLaunch& launch, const at::Tensor& source, const OptionalTensor& used, const Fusion& prologue) {
  const int64_t vector = 16 / static_cast<int64_t>(source.element_size());
  const bool planar_result = has_value(launch.result) && launch.result->stride(3) == 1;
  launch.source = source;
  if (!prologue.has_prologue()) {
    if (pointwise({launch.h, launch.w}) && !launch.gradient && planar_result && aligned_chunks(source, true)) {
      launch.route = ConvRoute::kPlanes;
      return launch_conv_into_result(launch);
    }
    const bool blocks = std::all_of(launch.runs.begin(), launch.runs.end(),
                                    [&](const LaunchRun& run) { return run.list.block % vector == 0; });
    if (blocks && aligned_chunks(source, false)) return launch_conv_into_result(launch);
  }
  if (takes_halo(launch)) {
    launch.route = ConvRoute::kHalo;
    launch.source_scale = prologue.in_scale;
    launch.source_shift = prologue.in_shift;
    launch.source_relu = prologue.in_relu;
    return launch_conv_into_result(launch);
  }
  launch.source = packed_channels(source, launch.runs, used, prologue);
  for (LaunchRun& run : launch.runs) run.list = {std::nullopt, 0, run.list.length};
  launch_conv_into_result(launch);
}

at::Tensor cuda_gathered_conv2d(const ConvCall& c, const char* op) {
  const auto& s = c.shape;
  refuse_uncovered(op, c.input, c.weight, c.groups, s.out_h, s.out_w);
  const at::Tensor y = at::empty({s.batch, s.kept_out, s.out_h, s.out_w}, c.input.options().memory_format(c.format()));
  const Fusion& f = c.fusion;
  ConvLaunch launch;
  launch.result = y;
  launch.runs = {forward_run(c, 0)};
  // The bias is full-size; nothing else asks for the channels' numbers.
  launch.result_list = has_value(c.bias) ? list_form(c.out_index, s.channels_out) : ListForm{};
  launch.bias = c.bias;
  launch.scale = f.out_scale;
  launch.shift = f.out_shift;
  launch.residual = f.residual;
  launch.relu = f.out_relu;
  launch.columns = s.kept_out;
  if (c.dual_store != nullptr && c.dual_store_index->size(0) > 0) {
    launch.copy_list = c.dual_store_index->contiguous();
    launch.copy = c.dual_store;
    launch.copy_format = c.format();
  }
  run_forward(launch, c.input, c.weight, s.out_h, s.out_w, c.stride, c.padding, c.dilation, {}, f);
  return y;
}

void cuda_gathered_conv2d_mixed(const MixedCall& c, const char* op) {
  if (c.output.numel() == 0) return;
  const auto& s = c.shape;
  refuse_uncovered(op, c.input, c.weight, /*groups=*/1, s.out_h, s.out_w);
  ConvLaunch launch;
  launch.result = c.output;
  launch.bias = c.bias;
  launch.columns = s.channels_out;
  int64_t first = 0;
  for (const MixedRun& run : c.runs) {
    launch.runs.push_back(forward_run(c.call(run), first));
    first += run.input.size(0);
  }
  // The blocks with the longest sums start first, so that none of them is left for the end.
  std::stable_sort(launch.runs.begin(), launch.runs.end(),
                   [](const LaunchRun& a, const LaunchRun& b) { return a.list.length > b.list.length; });
  run_forward(launch, c.input, c.weight, s.out_h, s.out_w, c.stride, c.padding, c.dilation, {}, {});
}

void run_forward(ConvLaunch& launch, const at::Tensor& input, const at::Tensor& weight, int64_t out_h, int64_t out_w,
                 c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation,
                 const OptionalTensor& used, const Fusion& prologue) {
  at::Tensor x = input;
  std::array<int64_t, 2> step = {stride[0], stride[1]};
  const bool single_tap = weight.size(2) == 1 && weight.size(3) == 1;
  const bool padded = padding[0] != 0 || padding[1] != 0 || padding[2] != 0 || padding[3] != 0;
  if (single_tap && !padded && (step[0] != 1 || step[1] != 1)) {
    // Only the pixels that a strided 1x1 convolution meets.
    x = x.slice(2, 0, std::nullopt, step[0]).slice(3, 0, std::nullopt, step[1]);
    step = {1, 1};
  }
  const auto axes = axes_of(x, weight, out_h, out_w, step, padding, dilation);
  launch.h = axes[0];
  launch.w = axes[1];
  launch.depth = used;
  run_conv_route(launch, x, used, prologue);
}

}  // namespace bap_kernels
