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

// The parameters of a launch with this tile.
template <class Tile>
WeightGradientParams with_tiles(WeightGradientParams p) {
  p.out_h = divisor_of(p.axis_h.output);
  p.out_w = divisor_of(p.axis_w.output);
  p.taps = divisor_of(p.axis_h.kernel * p.axis_w.kernel);
  p.kernel_w = divisor_of(p.axis_w.kernel);
  p.column_tiles = divisor_of(ceil_div(p.columns, Tile::kColumns));
  return p;
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
  const int tile = p.taps.quotient(blockIdx.x), tap = p.taps.rest(blockIdx.x, tile), taps = p.taps.count();
  const int tap_h = p.kernel_w.quotient(tap), tap_w = p.kernel_w.rest(tap, tap_h);
  const int line = p.column_tiles.quotient(tile);
  const int first_column = p.column_tiles.rest(tile, line) * Tile::kColumns, first_row = line * Tile::kRows;
  const int used = p.used != nullptr ? *p.used : p.columns;
  const int first_pixel = blockIdx.y * p.pixels_per_chunk;
  const int left = p.batch * p.axis_h.output * p.axis_w.output - first_pixel;
  const int pixels = left < p.pixels_per_chunk ? left : p.pixels_per_chunk, end_pixel = first_pixel + pixels;
  const int steps = ceil_div(pixels, kDepth);
  if (first_column >= used) return;

  // The thread's copies of the next step, of pixel `pixel`, into the stage that begins at byte `to`.
  const int depth = copy_depth<kThreads, kBytes>(thread), first_chunk = copy_depth_chunk<kThreads, kBytes>(thread, 0);
  const scalar_t* grad = static_cast<const scalar_t*>(p.grad) + first_row + first_chunk * kVector;
  const scalar_t* source = static_cast<const scalar_t*>(p.source);
  int pixel = first_pixel + depth;
  int channels[kCopiesB];
#pragma unroll
  for (int i = 0; i < kCopiesB; ++i) {
    const int k = first_column + copy_depth_chunk<kThreads, kBytes>(thread, i) * kVector;
    channels[i] = k < used ? listed_channel(p.source_list, k) : 0;
  }
  const auto copy_chunks = [&]<bool kWhole>(std::bool_constant<kWhole>, int to) {
    const bool there = pixel < end_pixel;
    const RowPlace at = row_place(pixel, p.out_h, p.out_w);
    const int h = at.row * p.axis_h.stride - p.axis_h.before + tap_h * p.axis_h.dilation;
    const int w = at.column * p.axis_w.stride - p.axis_w.before + tap_w * p.axis_w.dilation;
    const bool inside = there && within(h, p.axis_h.input) && within(w, p.axis_w.input);
    const scalar_t* from_grad =
        grad + at.image * p.grad_stride.n + at.row * p.grad_stride.h + at.column * p.grad_stride.w;
    const scalar_t* from_source = source + at.image * p.source_stride.n + h * p.source_stride.h + w * p.source_stride.w;
#pragma unroll
    for (int i = 0; i < kCopiesA; ++i) {
      const int chunk = copy_depth_chunk<kThreads, kBytes>(thread, i), row = first_row + chunk * kVector;
      copy_chunk_unless<kWhole>(!there || row >= p.rows, to + by_depth<Tile::kRows, kBytes>(depth, chunk),
                                from_grad + (chunk - first_chunk) * kVector,
                                kWhole ? kChunkBytes : chunk_bytes<kBytes>(row, p.rows));
    }
#pragma unroll
    for (int i = 0; i < kCopiesB; ++i) {
      const int chunk = copy_depth_chunk<kThreads, kBytes>(thread, i), column = first_column + chunk * kVector;
      copy_chunk_unless<kWhole>(!inside || column >= used,
                                to + Tile::kColumnsAt + by_depth<Tile::kColumns, kBytes>(depth, chunk),
                                from_source + channels[i], kWhole ? kChunkBytes : chunk_bytes<kBytes>(column, used));
    }
    pixel += kDepth;
  };
  const bool whole = p.rows % kVector == 0 && used % kVector == 0;
  const auto copy = [&](int to) {
    if (whole) {
      copy_chunks(std::true_type(), to);
    } else {
      copy_chunks(std::false_type(), to);
    }
  };

  Sums<Tile> sums = {};
  multiply_steps<kMode, Tile, true, true>(sums, steps, copy);

  const int64_t first = (static_cast<int64_t>(blockIdx.y) * p.rows + first_row) * taps + tap;
  store_sums<Tile>(sums, p.partial + first * p.columns + first_column, int64_t{taps} * p.columns, p.rows - first_row,
                   used - first_column);
}

}  // namespace bap_kernels
