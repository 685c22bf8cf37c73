// Private op of the CUDA backend over torch's stable ABI: the weight's gradient, split over chunks of pixels whose sums
// are added in order; see gathered_conv2d.cpp.
#include <algorithm>

#include "backends/cuda/ops/tensors.h"

namespace bap_kernels {
namespace {

constexpr const char* kOp = "_weight_gradient_cuda";

// Pixels of each chunk, a multiple of `depth`: two waves of blocks at most, and at least four steps for each block.
int64_t pixels_per_chunk(int64_t pixels, int64_t tiles, int64_t depth, int processors) {
  const int64_t wanted = std::max<int64_t>(1, std::min(2 * processors / tiles, pixels / (4 * depth)));
  return (pixels + wanted * depth - 1) / (wanted * depth) * depth;
}

void weight_gradient(const Tensor& result, const Tensor& grad, const Tensor& source, const OptionalStable& source_list,
                     const OptionalStable& row_list, const OptionalStable& column_list, const OptionalStable& used,
                     const std::vector<int64_t>& list) {
  WeightGradientOptions o;
  STD_TORCH_CHECK(options_of(list, o), kOp, "(): expected ", sizeof(o) / 8, " options, got ", list.size(), ".");
  const Products products = products_of(source, o.tf32 != 0, kOp);
  STD_TORCH_CHECK(chunks_are_aligned(source, false) && chunks_are_aligned(grad, false), kOp,
                  "(): expected tensors with aligned chunks.");
  const OnDevice on(source);
  WeightGradientParams p{};
  p.grad = grad.const_data_ptr();
  p.source = source.const_data_ptr();
  p.grad_stride = strides_of(grad);
  p.source_stride = strides_of(source);
  p.source_list = list_params(source_list, o.source_block);
  p.used = count_pointer(used);
  p.batch = static_cast<int>(source.size(0));
  p.rows = static_cast<int>(o.rows);
  p.columns = static_cast<int>(o.columns);
  p.axis_h = o.h.axis();
  p.axis_w = o.w.axis();

  const TileShape tile = choose_weight_tile(p.rows, p.columns);
  const bool large = tile == TileShape::kLarge;
  const int taps = p.axis_h.kernel * p.axis_w.kernel;
  const int64_t tiles = int64_t{taps} * ceil_div(p.rows, large ? LargeTile::kRows : SmallTile::kRows) *
                        ceil_div(p.columns, large ? LargeTile::kColumns : SmallTile::kColumns);
  const int64_t pixels = int64_t{p.batch} * p.axis_h.output * p.axis_w.output;
  const int64_t depth = kDepthBytes / static_cast<int64_t>(source.element_size());
  p.pixels_per_chunk = static_cast<int>(pixels_per_chunk(pixels, tiles, depth, processor_count(on.device())));
  const int64_t chunks = (pixels + p.pixels_per_chunk - 1) / p.pixels_per_chunk;
  const Tensor partial = new_floats({chunks, p.rows, taps, p.columns}, source);
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  check_launch(launch_weight_gradient(p, products, tile, on.stream()), kOp, "weight_gradient", grad, source);

  SumPartialsParams s{};
  s.partial = p.partial;
  s.result = result.mutable_data_ptr();
  s.stride_chunk = partial.stride(0);
  s.stride_row = partial.stride(1);
  s.stride_tap = partial.stride(2);
  s.result_stride = strides_of(result);
  s.row_list = list_params(row_list, o.row_block);
  s.column_list = list_params(column_list, o.column_block);
  s.used = p.used;
  s.chunks = static_cast<int>(chunks);
  s.rows = p.rows;
  s.taps = taps;
  s.kernel_w = p.axis_w.kernel;
  s.columns = p.columns;
  s.result_is_float = result.scalar_type() == ScalarType::Float;
  check_launch(launch_sum_partials(s, products, on.stream()), kOp, "sum_partials", partial, result);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bap_kernels, m) {
  m.def(
      "_weight_gradient_cuda(Tensor(a!) result, Tensor grad, Tensor source, Tensor? source_list, Tensor? row_list, "
      "Tensor? column_list, Tensor? used, int[] options) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bap_kernels, BAP_KERNELS_DEVICE_KEY, m) {
  m.impl("_weight_gradient_cuda", TORCH_BOX(&weight_gradient));
}

}  // namespace bap_kernels
