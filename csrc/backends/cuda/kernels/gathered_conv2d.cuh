// The gathered convolution of NHWC sources: an implicit GEMM, for the forward and for the input's gradient.
//   result[m, j] = relu?(scale[j] * (sum over k, t of source[pixel(m, t), channel(k)] * weight[j, t, k] + bias[o])
//                        + shift[j] + residual[m, j])    with o = result_list[j]
// A row m is a pixel of the result, a column j one of its channels; k runs over channels, t over taps
// (conv_geometry.h).
//
// Block: Tile::kRows x Tile::kColumns of the result, or of one part of its sums, which split_epilogue.cu adds and
//   stores. Grid: (tiles of all runs, phases of the gradient along w, phases along h * parts). Shared memory: kStages
//   of both operands, filled kStages - 1 steps ahead; then the result in float32 and offsets.
// Needs:  16-byte aligned chunks of source and weight; `block` of the source's list 0 or a multiple of a chunk; lists
//   within range; batch * pixels below 2^31; rows and columns of taps that add up to 32 at most.
// Allows: any strides of result, residual and input, with int64 offsets; counts on the device; mixed batches.
// Accumulates in float32. No atomics: the result does not vary between runs.
#pragma once

#include "backends/cuda/kernels/nhwc_operands.cuh"
#include "backends/cuda/kernels/pipeline.cuh"

namespace bap_kernels {

template <MathMode kMode, class Tile, bool kGradient>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    gathered_conv2d_kernel(const __grid_constant__ ConvParams p) {
  using scalar_t = typename MathTraits<kMode>::scalar_t;
  constexpr int kBytes = sizeof(scalar_t);
  const int thread = threadIdx.x;
  const NhwcPlan plan = nhwc_plan<Tile, kBytes, kGradient>(p, p.parts.count);
  if (plan.first_column >= stored_columns(p) && !p.reduce_off) return;

  NhwcOperands<scalar_t, Tile, Tile::kThreads, FilterCopies<scalar_t, Tile::kColumns, Tile::kThreads>> operands;
  operands.begin(p, plan, thread);
  Sums<Tile> sums = {};
  multiply_steps<kMode, Tile, false, false>(sums, plan.steps, [&](int to) { operands.copy(p, plan, to, thread); });
  if (p.parts.sums != nullptr) {
    return store_sums<Tile>(sums, partial_sums(p, plan, plan.part), p.parts.stride_row, plan.rows - plan.first_row,
                            p.columns - plan.first_column);
  }
  __syncthreads();
  Epilogue<scalar_t, Tile, false>::stage_sums(sums);
  finish_tile<scalar_t, Tile>(p, plan);
}

}  // namespace bap_kernels
