// The epilogue of a convolution whose sums were cut into parts (split-K): adds the parts and applies what the kernels
// gathered_conv2d.cuh and warpgroup_conv2d.cuh apply to whole sums, in their own words.
//   sum[m, j] = sum over parts s, in order, of partial[s, m, j]
//
// Block: a tile of 16 x 64 of the result. A thread adds 4 columns of a row at a time. Grid: (tiles of all runs, phases
//   of the gradient along w, along h). Shared memory: the sums in float32 and offsets, as epilogue.cuh has them.
// Needs:  rows of `parts.sums` that start on 16 bytes.
// Allows: what gathered_conv2d.cuh allows, terms of a switch's gradient among them.
// Computes in float32. No atomics: the result does not vary between runs.
#include "backends/cuda/kernels/launch.cuh"
#include "backends/cuda/kernels/nhwc_operands.cuh"

namespace bap_kernels {

template <typename scalar_t>
__global__ void __launch_bounds__(SplitEpilogueTile::kThreads, 1)
    split_epilogue_kernel(const __grid_constant__ ConvParams p) {
  using Tile = SplitEpilogueTile;
  constexpr int kWidth = 4, kLine = Tile::kColumns / kWidth;
  // This grid has no parts: it divides by 1.
  const NhwcPlan plan = nhwc_plan<Tile, sizeof(scalar_t), true>(p, Divisor{1, 1, 0});
  if (plan.first_column >= stored_columns(p) && !p.reduce_off) return;

  const float* from = partial_sums(p, plan, 0);
  for (int i = threadIdx.x; i < Tile::kRows * kLine; i += Tile::kThreads) {
    const int row = i / kLine, column = i % kLine * kWidth;
    float sum[kWidth] = {};
    if (plan.first_row + row < plan.rows && plan.first_column + column < p.columns) {
      add_terms(sum, from + row * p.parts.stride_row + column, p.parts.stride_part, p.parts.count.count());
    }
#pragma unroll
    for (int v = 0; v < kWidth; ++v) Epilogue<scalar_t, Tile, false>::staged(row, column + v) = sum[v];
  }
  finish_tile<scalar_t, Tile>(p, plan);
}

Status launch_split_epilogue(const ConvParams& p, MathMode mode, void* stream) {
  using Tile = SplitEpilogueTile;
  return with_element(mode, [&](auto element) {
    return launch(split_epilogue_kernel<decltype(element)>, with_tiles<Tile>(p), nhwc_grid<Tile>(p, 1), Tile::kThreads,
                  Tile::kEpilogueBytes, stream);
  });
}

}  // namespace bap_kernels
