// The implicit GEMM over NHWC sources, for the forward and for the input's gradient: which rows and columns a block
// computes, and how a thread copies both operands of a step. The kernels that multiply by mma.sync
// (gathered_conv2d.cuh) and by wgmma (warpgroup_conv2d.cuh) share it.
//
// Row tiles run over all pixels of a run of images; grid (tiles of all runs, phases). A step is 128 bytes of channels
// at one tap: channels in blocks outside, taps inside. A thread copies one chunk of channels for several pixels: one
// look-up in the list per thread and block of channels.
#pragma once

#include "backends/cuda/kernels/epilogue.cuh"

namespace bap_kernels {

constexpr int kTileGroup = 8;  // row tiles side by side that share a column tile: see tile_place

template <class Tile>
BAP_HOST_DEVICE int row_tiles(const ConvParams& p, int images, bool gradient) {
  return ceil_div(grid_pixels(p, gradient) * images, Tile::kRows);
}
template <class Tile>
BAP_HOST_DEVICE int column_tiles(const ConvParams& p) {
  return ceil_div(p.columns, Tile::kColumns);
}

template <class Tile>
dim3 nhwc_grid(const ConvParams& p) {
  int tiles = 0;
  for (int run = 0; run < p.runs.count; ++run) tiles += row_tiles<Tile>(p, p.runs.of[run].images, p.gradient);
  return dim3(tiles * column_tiles<Tile>(p), p.gradient ? p.axis_h.stride * p.axis_w.stride : 1);
}

// What a block computes.
struct NhwcPlan {
  AxisPlan h, w;
  TilePlace tile;
  int run, rows, first_row, first_column, image, depth, steps;  // `image`: the first that rows count from
};

template <class Tile, int kElementBytes, bool kGradient>
__device__ __forceinline__ NhwcPlan nhwc_plan(const ConvParams& p) {
  NhwcPlan plan;
  const int phase = blockIdx.y;
  plan.h = kGradient ? gradient_axis(p.axis_h, phase / p.phases_w) : forward_axis(p.axis_h);
  plan.w = kGradient ? gradient_axis(p.axis_w, phase % p.phases_w) : forward_axis(p.axis_w);
  int block = blockIdx.x, tiles = row_tiles<Tile>(p, p.runs.of[0].images, kGradient) * column_tiles<Tile>(p);
  plan.run = 0;
  while (plan.run + 1 < p.runs.count && block >= tiles) {
    block -= tiles;
    tiles = row_tiles<Tile>(p, p.runs.of[++plan.run].images, kGradient) * column_tiles<Tile>(p);
  }
  const BatchRun& run = p.runs.of[plan.run];
  plan.image = run.first;
  plan.tile = tile_place(block, row_tiles<Tile>(p, run.images, kGradient), column_tiles<Tile>(p), kTileGroup);
  plan.rows = plan.h.count * plan.w.count * run.images;
  plan.first_row = plan.tile.row * Tile::kRows;
  plan.first_column = plan.tile.column * Tile::kColumns;
  plan.depth = p.depth != nullptr ? *p.depth : run.depth;
  plan.steps = ceil_div(plan.depth, kDepthBytes / kElementBytes) * plan.h.taps * plan.w.taps;
  return plan;
}

// Starts a thread's copies of kColumns filters: 128 bytes of depth from element `k` on, at one tap.
template <typename scalar_t, int kColumns, int kThreads>
__device__ __forceinline__ void copy_weight(const BatchRun& run, int to, int first_column, int columns, int tap, int k,
                                            int depth, int thread) {
  const scalar_t* weight = static_cast<const scalar_t*>(run.weight);
  const int chunk = copy_chunk(thread);
  k += chunk * (kChunkBytes / sizeof(scalar_t));
  const int there = chunk_bytes<sizeof(scalar_t)>(k, depth);
  const int64_t move = tap * run.stride_weight_tap + k;
#pragma unroll
  for (int i = 0; i < kColumns * kDepthChunks / kThreads; ++i) {
    const int row = copy_row<kThreads>(thread, i);
    const int column = first_column + row;
    const int bytes = column < columns ? there : 0;
    copy_async(to + by_rows(row, chunk), bytes > 0 ? weight + column * run.stride_weight_column + move : weight, bytes);
  }
}

// The copies of one of kThreads threads, step by step.
template <typename scalar_t, class Tile, int kThreads>
struct NhwcOperands {
  static constexpr int kBytes = sizeof(scalar_t);
  static constexpr int kVector = kChunkBytes / kBytes;
  static constexpr int kDepth = kDepthBytes / kBytes;
  static constexpr int kCopies = Tile::kRows * kDepthChunks / kThreads;

  int64_t source[kCopies];  // offset of each row's pixel at the first tap
  int row_h[kCopies], row_w[kCopies];
  int channel, next_channel;
  StepCursor cursor;

  // The channel that the thread copies in a block of channels; any that is there where it copies none.
  __device__ __forceinline__ static int look_up(const ConvParams& p, const NhwcPlan& plan, int block, int thread) {
    const int k = block * kDepth + copy_chunk(thread) * kVector;
    const ListParams& list = p.runs.of[plan.run].list;
    return k < plan.depth ? listed_channel(list.entries, list.block, k) : 0;
  }

  __device__ __forceinline__ void begin(const ConvParams& p, const NhwcPlan& plan, int thread) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int m = plan.first_row + copy_row<kThreads>(thread, i);
      source[i] = 0;
      row_h[i] = -(1 << 30);  // never within the source
      row_w[i] = 0;
      if (m < plan.rows) {
        const RowPlace at = row_place(m, plan.h.count, plan.w.count);
        row_h[i] = at.row * plan.h.source_step + plan.h.source_first;
        row_w[i] = at.column * plan.w.source_step + plan.w.source_first;
        source[i] =
            (plan.image + at.image) * p.source_stride.n + row_h[i] * p.source_stride.h + row_w[i] * p.source_stride.w;
      }
    }
    cursor = {0, 0, 0};
    channel = look_up(p, plan, 0, thread);
    next_channel = look_up(p, plan, 1, thread);
  }

  // Starts the copies of the next step into the stage that begins at byte `to`: the rows, then the columns.
  __device__ __forceinline__ void copy(const ConvParams& p, const NhwcPlan& plan, int to, int thread) {
    const scalar_t* from = static_cast<const scalar_t*>(p.source);
    const int k = cursor.block * kDepth, chunk = copy_chunk(thread);
    const int there = chunk_bytes<kBytes>(k + chunk * kVector, plan.depth);
    const int move_h = cursor.tap_h * plan.h.tap_step, move_w = cursor.tap_w * plan.w.tap_step;
    const int64_t move = move_h * p.source_stride.h + move_w * p.source_stride.w + channel;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool inside =
          within(row_h[i] + move_h, plan.h.source_size) && within(row_w[i] + move_w, plan.w.source_size);
      const int bytes = inside ? there : 0;
      copy_async(to + by_rows(copy_row<kThreads>(thread, i), chunk), bytes > 0 ? from + source[i] + move : from, bytes);
    }
    const int tap = (plan.h.weight_first + cursor.tap_h * plan.h.weight_step) * p.kernel_w + plan.w.weight_first +
                    cursor.tap_w * plan.w.weight_step;
    copy_weight<scalar_t, Tile::kColumns, kThreads>(p.runs.of[plan.run], to + Tile::kColumnsAt, plan.first_column,
                                                    p.columns, tap, k, plan.depth, thread);
    if (advance(cursor, plan.h.taps, plan.w.taps)) {
      channel = next_channel;
      next_channel = look_up(p, plan, cursor.block + 1, thread);
    }
  }
};

// The table of a tile's rows, for the epilogue.
template <typename scalar_t, class Tile>
__device__ __forceinline__ void write_rows(const ConvParams& p, const NhwcPlan& plan) {
  for (int row = threadIdx.x; row < Tile::kRows; row += Tile::kThreads) {
    const int m = plan.first_row + row;
    const bool there = m < plan.rows;
    const RowPlace at = row_place(there ? m : 0, plan.h.count, plan.w.count);
    Epilogue<scalar_t, Tile, false>::write_row(p, row, there, plan.image + at.image,
                                               at.row * plan.h.result_step + plan.h.result_first,
                                               at.column * plan.w.result_step + plan.w.result_first);
  }
}

}  // namespace bap_kernels
