// Routes of the forward on the CUDA kernels.
#include <ATen/ops/empty.h>

#include "cpu/packed_cache.h"
#include "cuda_backend/routes.h"
#include "kernels/halo_shape.h"

namespace bap_kernels {

const NamedBackend cuda_backend{cuda_gathered_conv2d, cuda_gathered_conv2d_backward, cuda_switched_conv2d,
                                cuda_switched_conv2d_backward};

namespace {

// Whether the kernel with a halo takes a forward as it lies.
bool takes_halo(const ConvLaunch& l) {
  if (l.gradient || l.full_width || !has_value(l.result)) return false;
  ConvParams p{};
  const at::Tensor& x = l.source;
  p.source_stride = {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  p.axis_h = l.h.axis();
  p.axis_w = l.w.axis();
  p.batch = static_cast<int>(x.size(0));
  p.columns = static_cast<int>(l.columns);
  p.depth_length = static_cast<int>(l.source_list.length);
  const auto address = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  // That there is a tile does not depend on the number of processors.
  return choose_halo(halo_case(p, address, static_cast<int>(x.element_size())), 1).fits;
}

}  // namespace

void run_conv_route(ConvLaunch& launch, const at::Tensor& source, const ListForm& list, const OptionalTensor& used,
                    const Fusion& prologue) {
  const int64_t vector = 16 / static_cast<int64_t>(source.element_size());
  const bool planar_result = has_value(launch.result) && launch.result->stride(3) == 1;
  launch.source = source;
  launch.source_list = list;
  if (!prologue.has_prologue()) {
    if (pointwise({launch.h, launch.w}) && !launch.gradient && planar_result && aligned_chunks(source, true)) {
      launch.route = ConvRoute::kPlanes;
      return launch_conv(launch);
    }
    if (list.block % vector == 0 && aligned_chunks(source, false)) return launch_conv(launch);
  }
  if (!prologue.has_prologue() && takes_halo(launch)) {
    launch.route = ConvRoute::kHalo;
    return launch_conv(launch);
  }
  launch.source = packed_channels(source, list, used, prologue);
  launch.source_list = {std::nullopt, 0, list.length};
  launch_conv(launch);
}

at::Tensor cuda_gathered_conv2d(const ConvCall& c, const char* op) {
  const auto& s = c.shape;
  TORCH_CHECK_NOT_IMPLEMENTED(!has_value(c.weight_index), op,
                              "(): expected an input with all of the weight's channels, got `weight_index`, for which "
                              "backend `cuda` has no kernel. Hint: use_backend(\"auto\") takes the ATen path.");
  refuse_uncovered(op, c.input, c.weight, c.groups, s.out_h, s.out_w);
  const at::Tensor y = at::empty({s.batch, s.kept_out, s.out_h, s.out_w}, c.input.options().memory_format(c.format()));
  const Fusion& f = c.fusion;
  ConvLaunch launch;
  launch.result = y;
  launch.weight = PackedCache::instance().get(c, PackedKind::kByFilter, 0, [&] {
    return packed_weight(c.weight, c.out_index, c.in_index, /*by_input=*/false);
  });
  // The bias is full-size; nothing else asks for the channels' numbers.
  launch.result_list = has_value(c.bias) ? list_form(c.out_index, s.channels_out) : ListForm{};
  launch.bias = c.bias;
  launch.scale = f.out_scale;
  launch.shift = f.out_shift;
  launch.residual = f.residual;
  launch.relu = f.out_relu;
  launch.columns = s.kept_out;
  run_forward(launch, c.input, c.weight, list_form(c.in_index, s.channels_in), s.out_h, s.out_w, c.stride, c.padding,
              c.dilation, {}, f);
  return y;
}

void run_forward(ConvLaunch& launch, const at::Tensor& input, const at::Tensor& weight, const ListForm& list,
                 int64_t out_h, int64_t out_w, c10::IntArrayRef stride, c10::IntArrayRef padding,
                 c10::IntArrayRef dilation, const OptionalTensor& used, const Fusion& prologue) {
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
  run_conv_route(launch, x, list, used, prologue);
}

}  // namespace bap_kernels
