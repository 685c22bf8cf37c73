// The weight's gradient as a GEMM over the result's pixels: which tile of it a block computes, and which places of both
// operands a pixel means. The kernels that multiply by mma.sync (weight_gradient.cuh) and by wgmma
// (warpgroup_weight_gradient.cuh) share it.
//
// Grid: (filter tiles * channel tiles * taps, chunks of pixels); taps are the fastest, so that neighbours read the same
// pixels. A step is 128 bytes of depth: 64 pixels of 16-bit elements.
#pragma once

#include "backends/cuda/kernels/fragments.cuh"

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

// What a block computes; `used`: where the columns end.
struct WeightPlan {
  int tap, tap_h, tap_w;
  int first_row, first_column, used;
  int first_pixel, end_pixel, steps;
};

template <class Tile, int kElementBytes>
__device__ __forceinline__ WeightPlan weight_plan(const WeightGradientParams& p) {
  WeightPlan plan;
  const int tile = p.taps.quotient(blockIdx.x), line = p.column_tiles.quotient(tile);
  plan.tap = p.taps.rest(blockIdx.x, tile);
  plan.tap_h = p.kernel_w.quotient(plan.tap);
  plan.tap_w = p.kernel_w.rest(plan.tap, plan.tap_h);
  plan.first_row = line * Tile::kRows;
  plan.first_column = p.column_tiles.rest(tile, line) * Tile::kColumns;
  plan.used = p.used != nullptr ? *p.used : p.columns;
  plan.first_pixel = blockIdx.y * p.pixels_per_chunk;
  const int left = p.batch * p.axis_h.output * p.axis_w.output - plan.first_pixel;
  const int pixels = left < p.pixels_per_chunk ? left : p.pixels_per_chunk;
  plan.end_pixel = plan.first_pixel + pixels;
  plan.steps = ceil_div(pixels, kDepthBytes / kElementBytes);
  return plan;
}

// Where a pixel of the result lies in both operands: whether there is one, whether it meets one of the source at the
// block's tap, and their first channels.
template <typename scalar_t>
struct PixelPlace {
  bool there, inside;
  const scalar_t *grad, *source;
};
template <typename scalar_t>
__device__ __forceinline__ PixelPlace<scalar_t> pixel_place(const WeightGradientParams& p, const WeightPlan& plan,
                                                            int pixel) {
  const RowPlace at = row_place(pixel, p.out_h, p.out_w);
  const int h = at.row * p.axis_h.stride - p.axis_h.before + plan.tap_h * p.axis_h.dilation;
  const int w = at.column * p.axis_w.stride - p.axis_w.before + plan.tap_w * p.axis_w.dilation;
  const bool there = pixel < plan.end_pixel;
  return {there, there && within(h, p.axis_h.input) && within(w, p.axis_w.input),
          static_cast<const scalar_t*>(p.grad) + at.image * p.grad_stride.n + at.row * p.grad_stride.h +
              at.column * p.grad_stride.w,
          static_cast<const scalar_t*>(p.source) + at.image * p.source_stride.n + h * p.source_stride.h +
              w * p.source_stride.w};
}

// Stores the sums of a tile's chunk.
template <class Tile>
__device__ __forceinline__ void store_chunk_sums(const WeightGradientParams& p, const WeightPlan& plan,
                                                 const Sums<Tile>& sums) {
  const int64_t taps = p.taps.count();
  const int64_t first = (static_cast<int64_t>(blockIdx.y) * p.rows + plan.first_row) * taps + plan.tap;
  store_sums<Tile>(sums, p.partial + first * p.columns + plan.first_column, taps * p.columns, p.rows - plan.first_row,
                   plan.used - plan.first_column);
}

}  // namespace bap_kernels
