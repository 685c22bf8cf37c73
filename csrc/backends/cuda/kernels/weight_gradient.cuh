// The weight's gradient: a GEMM over the result's pixels, split into chunks.
//   partial[s, j, t, i] = sum over the pixels (n, oh, ow) of chunk s of grad[n, j, oh, ow] * source[n, c, ih, iw]
//   ih = oh * stride - before + kh * dilation, iw likewise; t = kh * kW + kw; c = source_list[i]
//
// Block: kRows filters x kColumns input channels of one tap and one chunk. Grid: (filter tiles * channel tiles * taps,
//   chunks); taps are the fastest, so that neighbours read the same pixels.
// A thread copies several chunks of channels of one pixel; its look-ups stay the same for the whole sum.
// Shared memory: kStages of both operands, each [pixel][channel]: matrices are loaded transposed.
// Needs:  grad and source in NHWC with 16-byte aligned chunks; `block` of the list 0 or a multiple of a chunk.
// Accumulates in float32. No atomics: chunks are added in order by sum_partials.cu.
#pragma once

#include "backends/cuda/kernels/pipeline.cuh"

namespace bap_kernels {

template <class Tile>
dim3 weight_gradient_grid(const WeightGradientParams& p) {
  const int taps = p.axis_h.kernel * p.axis_w.kernel, pixels = p.batch * p.axis_h.output * p.axis_w.output;
  return dim3(taps * ceil_div(p.columns, Tile::kColumns) * ceil_div(p.rows, Tile::kRows),
              ceil_div(pixels, p.pixels_per_chunk));
}

template <MathMode kMode, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    weight_gradient_kernel(const __grid_constant__ WeightGradientParams p) {
  using scalar_t = typename MathTraits<kMode>::scalar_t;
  constexpr int kBytes = sizeof(scalar_t), kVector = kChunkBytes / kBytes, kDepth = kDepthBytes / kBytes;
  constexpr int kThreads = Tile::kThreads;
  constexpr int kCopiesA = Tile::kRows * kDepth / kVector / kThreads;
  constexpr int kCopiesB = Tile::kColumns * kDepth / kVector / kThreads;
  const int thread = threadIdx.x;
  const int taps = p.axis_h.kernel * p.axis_w.kernel, column_tiles = ceil_div(p.columns, Tile::kColumns);
  const int tap = static_cast<int>(blockIdx.x) % taps, tile = static_cast<int>(blockIdx.x) / taps;
  const int tap_h = tap / p.axis_w.kernel, tap_w = tap % p.axis_w.kernel;
  const int first_column = tile % column_tiles * Tile::kColumns, first_row = tile / column_tiles * Tile::kRows;
  const int used = p.used != nullptr ? *p.used : p.columns;
  const int first_pixel = blockIdx.y * p.pixels_per_chunk;
  const int left = p.batch * p.axis_h.output * p.axis_w.output - first_pixel;
  const int pixels = left < p.pixels_per_chunk ? left : p.pixels_per_chunk, end_pixel = first_pixel + pixels;
  const int steps = ceil_div(pixels, kDepth);
  if (first_column >= used) return;

  // The thread's copies of the next step, of pixel `pixel`, into the stage that begins at byte `to`.
  const scalar_t* grad = static_cast<const scalar_t*>(p.grad);
  const scalar_t* source = static_cast<const scalar_t*>(p.source);
  const int depth = copy_depth<kThreads, kBytes>(thread);
  int pixel = first_pixel + depth;
  int channels[kCopiesB];
#pragma unroll
  for (int i = 0; i < kCopiesB; ++i) {
    const int k = first_column + copy_depth_chunk<kThreads, kBytes>(thread, i) * kVector;
    channels[i] = k < used ? listed_channel(p.source_list.entries, p.source_list.block, k) : 0;
  }
  const auto copy = [&](int to) {
    const bool there = pixel < end_pixel;
    const RowPlace at = row_place(there ? pixel : 0, p.axis_h.output, p.axis_w.output);
    const int h = at.row * p.axis_h.stride - p.axis_h.before + tap_h * p.axis_h.dilation;
    const int w = at.column * p.axis_w.stride - p.axis_w.before + tap_w * p.axis_w.dilation;
    const bool inside = there && within(h, p.axis_h.input) && within(w, p.axis_w.input);
    const int64_t from_grad = at.image * p.grad_stride.n + at.row * p.grad_stride.h + at.column * p.grad_stride.w;
    const int64_t from_source = at.image * p.source_stride.n + h * p.source_stride.h + w * p.source_stride.w;
#pragma unroll
    for (int i = 0; i < kCopiesA; ++i) {
      const int chunk = copy_depth_chunk<kThreads, kBytes>(thread, i);
      const int row = first_row + chunk * kVector;
      const int bytes = there ? chunk_bytes<kBytes>(row, p.rows) : 0;
      copy_async(to + by_depth<Tile::kRows, kBytes>(depth, chunk), bytes > 0 ? grad + from_grad + row : grad, bytes);
    }
#pragma unroll
    for (int i = 0; i < kCopiesB; ++i) {
      const int chunk = copy_depth_chunk<kThreads, kBytes>(thread, i);
      const int column = first_column + chunk * kVector;
      const int bytes = inside ? chunk_bytes<kBytes>(column, used) : 0;
      copy_async(to + Tile::kColumnsAt + by_depth<Tile::kColumns, kBytes>(depth, chunk),
                 bytes > 0 ? source + from_source + channels[i] : source, bytes);
    }
    pixel += kDepth;
  };

  Sums<Tile> sums = {};
  multiply_steps<kMode, Tile, true, true>(sums, steps, copy);

  const int lane = thread % kWarp;
#pragma unroll
  for (int i = 0; i < Tile::kMmasM; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = first_row + warp_row<Tile>() + i * kMmaRows + fragment_row_c(lane, r);
      if (row >= p.rows) continue;
      float* line = p.partial + ((static_cast<int64_t>(blockIdx.y) * p.rows + row) * taps + tap) * p.columns;
#pragma unroll
      for (int j = 0; j < Tile::kMmasN; ++j) {
        const int column = first_column + warp_column<Tile>() + j * kMmaColumns + fragment_column_c(lane, r);
        if (column < used) line[column] = sums[i][j][r];
      }
    }
  }
}

}  // namespace bap_kernels
