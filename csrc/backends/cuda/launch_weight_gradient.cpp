// The launches of the weight's gradient.
#include <algorithm>

#include "backends/cuda/launch_params.h"
#include "backends/cuda/plan.h"

namespace bap_kernels {

void launch_weight_gradient(const at::Tensor& result, const at::Tensor& grad, const at::Tensor& source,
                            const ListForm& source_list, const ListForm& rows, const ListForm& columns,
                            const OptionalTensor& used, const ConvAxis& h, const ConvAxis& w) {
  TORCH_INTERNAL_ASSERT(aligned_chunks(source, false) && aligned_chunks(grad, false));
  const MathMode mode = products_of(source);
  const OnDevice on(source);
  WeightGradientParams p{};
  p.grad = grad.const_data_ptr();
  p.source = source.const_data_ptr();
  p.grad_stride = copied_strides(grad);
  p.source_stride = copied_strides(source);
  p.source_list = list_params(source_list);
  p.used = count_pointer(used);
  p.batch = static_cast<int>(source.size(0));
  p.rows = static_cast<int>(rows.length);
  p.columns = static_cast<int>(columns.length);
  p.axis_h = h;
  p.axis_w = w;

  const auto [tile, warpgroups] = choose_weight_gradient(source, p.rows, p.columns);
  const bool large = tile == TileShape::kLarge;
  const int taps = h.kernel * w.kernel;
  const int64_t tiles = int64_t{taps} * ceil_div(p.rows, large ? LargeTile::kRows : SmallTile::kRows) *
                        ceil_div(p.columns, large ? LargeTile::kColumns : SmallTile::kColumns);
  const int64_t pixels = int64_t{p.batch} * h.output * w.output;
  const int64_t depth = kDepthBytes / static_cast<int64_t>(source.element_size());
  // Two waves of blocks at most, and at least four steps for each block.
  const int64_t most = std::max<int64_t>(1, std::min(2 * launcher().sm_count(on.index) / tiles, pixels / (4 * depth)));
  p.pixels_per_chunk = static_cast<int>((pixels + most * depth - 1) / (most * depth) * depth);
  const int64_t chunks = (pixels + p.pixels_per_chunk - 1) / p.pixels_per_chunk;
  const at::Tensor partial = new_floats({chunks, p.rows, taps, p.columns}, source);
  p.partial = partial.mutable_data_ptr<float>();
  if (warpgroups) {
    check_launch(launcher().warpgroup_weight_gradient(p, mode, on.stream), "warpgroup_weight_gradient", grad, source);
  } else {
    check_launch(launcher().weight_gradient(p, mode, tile, on.stream), "weight_gradient", grad, source);
  }

  SumPartialsParams s{};
  s.partial = p.partial;
  s.result = result.mutable_data_ptr();
  s.stride_chunk = partial.stride(0);
  s.stride_row = partial.stride(1);
  s.stride_tap = partial.stride(2);
  s.result_stride = strides_of(result);
  s.row_list = list_params(rows);
  s.column_list = list_params(columns);
  s.used = p.used;
  s.chunks = static_cast<int>(chunks);
  s.rows = p.rows;
  s.taps = taps;
  s.kernel_w = w.kernel;
  s.columns = p.columns;
  s.result_is_float = result.scalar_type() == at::kFloat;
  check_launch(launcher().sum_partials(s, mode, on.stream), "sum_partials", partial, result);
}

}  // namespace bap_kernels
