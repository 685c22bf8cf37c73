// The weight's gradient: a GEMM over the result's pixels, split into chunks.
//   partial[s, j, t, i] = sum over the pixels (n, oh, ow) of chunk s of grad[n, j, oh, ow] * source[n, c, ih, iw]
//   ih = oh * stride - before + kh * dilation, iw likewise; t = kh * kW + kw; c = source_list[i]
//
// Block: kRows filters x kColumns input channels of one tap and one chunk. Grid: as weight_operands.cuh says.
// A thread copies several chunks of channels of one pixel; its look-ups stay the same for the whole sum.
// Shared memory: kStages of both operands, each [pixel][channel]: matrices are loaded transposed.
// Needs:  grad and source in NHWC with 16-byte aligned chunks; `block` of the list 0 or a multiple of a chunk.
// Accumulates in float32. No atomics: chunks are added in order by sum_partials.cu.
#pragma once

#include "backends/cuda/kernels/pipeline.cuh"
#include "backends/cuda/kernels/weight_operands.cuh"

namespace bap_kernels {

template <MathMode kMode, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    weight_gradient_kernel(const __grid_constant__ WeightGradientParams p) {
  using scalar_t = typename MathTraits<kMode>::scalar_t;
  constexpr int kBytes = sizeof(scalar_t), kVector = kChunkBytes / kBytes, kDepth = kDepthBytes / kBytes;
  constexpr int kThreads = Tile::kThreads;
  constexpr int kCopiesA = Tile::kRows * kDepth / kVector / kThreads;
  constexpr int kCopiesB = Tile::kColumns * kDepth / kVector / kThreads;
  const int thread = threadIdx.x;
  const WeightPlan plan = weight_plan<Tile, kBytes>(p);
  if (plan.first_column >= plan.used) return;

  // The thread's copies of the next step, of pixel `pixel`, into the stage that begins at byte `to`.
  const int depth = copy_depth<kThreads, kBytes>(thread);
  const int first_row = plan.first_row + copy_depth_chunk<kThreads, kBytes>(thread, 0) * kVector;
  int pixel = plan.first_pixel + depth;
  int channels[kCopiesB];
#pragma unroll
  for (int i = 0; i < kCopiesB; ++i) {
    const int k = plan.first_column + copy_depth_chunk<kThreads, kBytes>(thread, i) * kVector;
    channels[i] = k < plan.used ? listed_channel(p.source_list, k) : 0;
  }
  const auto copy_chunks = [&]<bool kWhole>(std::bool_constant<kWhole>, int to) {
    const PixelPlace<scalar_t> at = pixel_place<scalar_t>(p, plan, pixel);
    const scalar_t* grad = at.grad + first_row;
#pragma unroll
    for (int i = 0; i < kCopiesA; ++i) {
      const int chunk = copy_depth_chunk<kThreads, kBytes>(thread, i), row = plan.first_row + chunk * kVector;
      copy_chunk_unless<kWhole>(!at.there || row >= p.rows, to + by_depth<Tile::kRows, kBytes>(depth, chunk),
                                grad + (row - first_row), kWhole ? kChunkBytes : chunk_bytes<kBytes>(row, p.rows));
    }
#pragma unroll
    for (int i = 0; i < kCopiesB; ++i) {
      const int chunk = copy_depth_chunk<kThreads, kBytes>(thread, i), column = plan.first_column + chunk * kVector;
      copy_chunk_unless<kWhole>(!at.inside || column >= plan.used,
                                to + Tile::kColumnsAt + by_depth<Tile::kColumns, kBytes>(depth, chunk),
                                at.source + channels[i], kWhole ? kChunkBytes : chunk_bytes<kBytes>(column, plan.used));
    }
    pixel += kDepth;
  };
  const bool whole = p.rows % kVector == 0 && plan.used % kVector == 0;
  const auto copy = [&](int to) {
    if (whole) {
      copy_chunks(std::true_type(), to);
    } else {
      copy_chunks(std::false_type(), to);
    }
  };

  Sums<Tile> sums = {};
  multiply_steps<kMode, Tile, true, true>(sums, plan.steps, copy);
  store_chunk_sums<Tile>(p, plan, sums);
}

}  // namespace bap_kernels
