// The launches of a convolution: the forward, and the input's gradient as a convolution.
#include <ATen/ops/empty.h>

#include <algorithm>

#include "backends/cuda/launch_params.h"
#include "backends/cuda/plan.h"

namespace bap_kernels {
namespace {

// Adds the rows of `partial` (terms, columns) into the places of `result` that the list names.
void sum_terms(const at::Tensor& partial, const at::Tensor& result, const ListParams& list, const int32_t* used,
               MathMode mode, const OnDevice& on) {
  SumPartialsParams p{};
  p.partial = partial.const_data_ptr<float>();
  p.result = result.mutable_data_ptr();
  p.stride_chunk = partial.size(1);
  p.result_stride = {0, result.stride(0), 0, 0};
  p.column_list = list;
  p.used = used;
  p.chunks = static_cast<int>(partial.size(0));
  p.rows = p.taps = p.kernel_w = 1;
  p.columns = static_cast<int>(partial.size(1));
  p.result_is_float = result.scalar_type() == at::kFloat;
  check_launch(launcher().sum_partials(p, mode, on.stream), "sum_partials", partial, result);
}

int row_tile(TileShape tile) {
  return tile == TileShape::kSmall ? SmallTile::kRows : tile == TileShape::kLarge ? LargeTile::kRows : ThinTile::kRows;
}

// Packs the weights of a launch's runs, of which the first has this number, and says where they lie. They are to live
// until the launch.
std::vector<at::Tensor> place_weights(Runs& runs, const ConvLaunch& l, size_t first, WeightForm form) {
  std::vector<at::Tensor> weights;
  for (int i = 0; i < runs.count; ++i) {
    weights.push_back(l.runs[first + i].weight(form));
    runs.of[i].weight = weights.back().const_data_ptr();
    runs.of[i].stride_weight_column = weights.back().stride(0);
    runs.of[i].stride_weight_tap = weights.back().stride(1);
  }
  return weights;
}

// The forward with a halo, of filled-in parameters.
void launch_halo(const ConvParams& conv, const ConvLaunch& l, const at::Tensor& weight, MathMode mode,
                 const OnDevice& on) {
  HaloParams p{};
  p.conv = conv;
  p.planes = l.source.stride(3) == 1;
  p.planar_result = l.result->stride(3) == 1;
  p.prologue = conv.source_scale.values != nullptr || conv.source_shift.values != nullptr || conv.source_relu;
  // Where 16 bytes of a plane's row start is seen row by row.
  if (p.planar_result) {
    p.conv.result_vector = reinterpret_cast<uintptr_t>(conv.result) % kChunkBytes == 0;
    const Strides& copy = conv.copy_stride;
    p.conv.copy_vector =
        reinterpret_cast<uintptr_t>(conv.copy) % kChunkBytes == 0 && copy.w == 1 && copy.h == l.result->size(3);
  }
  const auto element_bytes = static_cast<int>(l.source.element_size());
  const HaloChoice choice = choose_halo(halo_case(conv, reinterpret_cast<uintptr_t>(conv.source), element_bytes),
                                        launcher().sm_count(on.index));
  TORCH_INTERNAL_ASSERT(choice.fits && !conv.gradient && !conv.full_width);
  p.shape = choice.shape;
  check_launch(launcher().halo_conv2d(p, mode, choice.tile, choice.shared_bytes, on.stream), "halo_conv2d", l.source,
               weight);
}

// Calls `body` with the phases of each launch filled in; the forward has one.
template <class Body>
void for_phases(ConvParams p, Body body) {
  const int all_h = p.gradient ? p.axis_h.stride : 1, all_w = p.gradient ? p.axis_w.stride : 1;
  const auto axis = [&p](const ConvAxis& a, int phase) {
    return p.gradient ? gradient_axis(a, phase) : forward_axis(a);
  };
  for (p.first_phase_h = 0; p.first_phase_h < all_h; p.first_phase_h += kMaxPhases) {
    p.phases_h = std::min(all_h - p.first_phase_h, kMaxPhases);
    for (int i = 0; i < p.phases_h; ++i) p.plans_h[i] = axis(p.axis_h, p.first_phase_h + i);
    for (p.first_phase_w = 0; p.first_phase_w < all_w; p.first_phase_w += kMaxPhases) {
      p.phases_w = std::min(all_w - p.first_phase_w, kMaxPhases);
      for (int i = 0; i < p.phases_w; ++i) p.plans_w[i] = axis(p.axis_w, p.first_phase_w + i);
      body(p);
    }
  }
}

// Room for a sum's parts.
at::Tensor new_parts(PartialSums& parts, int count, int64_t grids, int64_t pixels, int64_t columns,
                     const at::Tensor& like) {
  const at::Tensor sums = new_floats({count, grids, pixels, (columns + 3) / 4 * 4}, like);
  parts.sums = sums.mutable_data_ptr<float>();
  parts.stride_part = sums.stride(0);
  parts.stride_phase = sums.stride(1);
  parts.stride_row = static_cast<int>(sums.stride(2));
  return sums;
}

// One launch, or one for each kMaxPhases phases, of parameters that lack what depends on tile and phase; two where sums
// are cut into parts.
void launch_gemm(ConvParams p, const ConvLaunch& l, const GemmChoice& choice, const at::Tensor& weight, MathMode mode,
                 const OnDevice& on) {
  const bool planes = l.route == ConvRoute::kPlanes, reduced = has_value(l.grad_switch);
  p.parts.count = divisor_of(choice.parts);
  at::Tensor parts, partial;
  if (choice.parts > 1) {
    const int64_t pixels = l.source.size(0) * p.pixels;
    parts = new_parts(p.parts, choice.parts, choice.grids, pixels, p.columns, l.source);
  }
  if (reduced) {
    const int tile = choice.parts > 1 ? SplitEpilogueTile::kRows : row_tile(choice.tile);
    partial = new_floats({choice.grids * tiles_of(choice.rows, tile), p.columns}, l.source);
    p.partial = partial.mutable_data_ptr<float>();
    p.input = l.input->const_data_ptr();
    p.input_stride = strides_of(*l.input);
    p.reduce_off = l.reduce_off;
  }
  for_phases(p, [&](const ConvParams& phases) {
    const auto check = [&](Status status, const char* kernel) { check_launch(status, kernel, l.source, weight); };
    if (choice.warpgroups) {
      check(launcher().warpgroup_conv2d(phases, mode, choice.warpgroup_tile, on.stream), "warpgroup_conv2d");
    } else {
      check(launcher().gathered_conv2d(phases, mode, choice.tile, planes, on.stream), "gathered_conv2d");
    }
    if (choice.parts > 1) check(launcher().split_epilogue(phases, mode, on.stream), "split_epilogue");
  });
  if (reduced) sum_terms(partial, *l.grad_switch, p.result_list, p.reduce_off ? nullptr : p.stored, mode, on);
}

}  // namespace

void launch_conv(const ConvLaunch& l) {
  const MathMode mode = products_of(l.source);
  const bool planes = l.route == ConvRoute::kPlanes, halo = l.route == ConvRoute::kHalo;
  TORCH_INTERNAL_ASSERT(halo || aligned_chunks(l.source, planes));
  const OnDevice on(l.source);
  const OptionalTensor bias = dense(l.bias), scale = dense(l.scale), shift = dense(l.shift);
  const OptionalTensor source_scale = dense(l.source_scale), source_shift = dense(l.source_shift);
  ConvParams p{};
  p.source = l.source.const_data_ptr();
  p.source_stride = halo ? strides_of(l.source) : copied_strides(l.source);
  p.result_list = list_params(l.result_list);
  p.full_width = l.full_width;
  p.depth = count_pointer(l.depth);
  p.stored = count_pointer(l.stored);
  p.columns = static_cast<int>(l.columns);
  p.gradient = l.gradient;
  p.axis_h = l.h;
  p.axis_w = l.w;
  p.kernel_w = p.axis_w.kernel;
  p.pixels = p.gradient ? ceil_div(l.h.input, l.h.stride) * ceil_div(l.w.input, l.w.stride) : l.h.output * l.w.output;
  p.bias = vector_params(bias);
  p.scale = vector_params(scale);
  p.shift = vector_params(shift);
  p.relu = l.relu;
  p.source_scale = vector_params(source_scale);
  p.source_shift = vector_params(source_shift);
  p.source_relu = l.source_relu;
  if (has_value(l.residual)) {
    p.residual = l.residual->const_data_ptr();
    p.residual_stride = strides_of(*l.residual);
    p.residual_vector = aligned_chunks(*l.residual, false);
  }
  if (has_value(l.result)) {
    p.result = l.result->mutable_data_ptr();
    p.result_stride = strides_of(*l.result);
    const int64_t vector = kChunkBytes / static_cast<int64_t>(l.source.element_size());
    // Listed columns stand side by side where the list consists of blocks.
    const bool together = planes || !p.full_width || p.result_list.block % vector == 0;
    p.result_vector = together && aligned_chunks(*l.result, planes);
  }
  if (l.copy != nullptr) {
    TORCH_INTERNAL_ASSERT(has_value(l.copy_list) && l.copy->size(1) == l.copy_list->size(0) && has_value(l.result) &&
                          !p.gradient && !p.full_width);
    p.copy = l.copy->mutable_data_ptr();
    p.copy_stride = strides_of(*l.copy);
    p.copy_list = l.copy_list->const_data_ptr<int32_t>();
    p.copied = static_cast<int>(l.copy_list->size(0));
    p.copy_vector = aligned_chunks(*l.copy, planes);
  }
  for_launches(l.runs, [&](const Runs& runs, size_t first, int images) {
    p.runs = runs;
    p.batch = images;
    if (halo) {
      const auto weights = place_weights(p.runs, l, first, WeightForm::kRows);
      return launch_halo(p, l, weights[0], mode, on);
    }
    const GemmChoice choice = choose_gemm(l, images);
    const auto weights = place_weights(p.runs, l, first, choice.warpgroups ? WeightForm::kTiles : WeightForm::kRows);
    launch_gemm(p, l, choice, weights[0], mode, on);
  });
}

void launch_conv_into_result(ConvLaunch l, bool spread) {
  if (!has_value(l.result)) return launch_conv(l);
  const at::Tensor result = *l.result;
  if (!spread) {
    if (l.full_width) result.zero_();
    if (l.copy != nullptr) {
      *l.copy = at::empty({result.size(0), l.copy_list->size(0), result.size(2), result.size(3)},
                          result.options().memory_format(l.copy_format));
    }
    return launch_conv(l);
  }
  // It would be single elements of planes, too: selected afterwards.
  l.copy_list.reset();
  l.copy = nullptr;
  const ListForm list = l.full_width ? l.result_list : ListForm{std::nullopt, 0, l.columns};
  const at::Tensor copy = new_copy(result, l.columns);
  l.result = copy;
  l.full_width = false;
  launch_conv(l);
  unpack_channels(result, copy, list, l.stored);
}

}  // namespace bap_kernels
