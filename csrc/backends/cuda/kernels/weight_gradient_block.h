// What one block of the weight's gradient computes: a GEMM over the result's pixels, split into chunks.
//   partial[s, j, t, i] = sum over the pixels (n, oh, ow) of chunk s of grad[n, j, oh, ow] * source[n, c, ih, iw]
//   ih = oh * stride - before + kh * dilation, iw likewise; t = kh * kW + kw; c = source_list[i]
//
// Block: kRows filters x kColumns input channels of one tap and one chunk. Grid: (filter tiles * channel tiles * taps,
//   chunks); taps are the fastest, so that neighbours read the same pixels.
// A thread copies several chunks of channels of one pixel; its look-ups stay the same for the whole sum.
// Shared memory: kStages of both operands, each [pixel][channel]: matrices are loaded transposed.
// Needs:  grad and source in NHWC with 16-byte aligned chunks; `block` of the list 0 or a multiple of a chunk.
// Accumulates in float32. No atomics: chunks are added in order by sum_partials_block.h.
#pragma once

#include "backends/cuda/kernels/pipeline.h"

namespace bap_kernels {

template <MathMode kMode_, class Tile_>
struct WeightGradient {
  using Tile = Tile_;
  using scalar_t = typename MathTraits<kMode_>::scalar_t;
  static constexpr MathMode kMode = kMode_;
  static constexpr int kBytes = sizeof(scalar_t);
  static constexpr int kVector = kChunkBytes / kBytes;
  static constexpr int kDepth = kDepthBytes / kBytes;
  static constexpr int kThreads = Tile::kThreads, kStages = Tile::kStages, kStageBytes = Tile::kStageBytes;
  static constexpr int kCopiesA = Tile::kRows * kDepth / kVector / kThreads;
  static constexpr int kCopiesB = Tile::kColumns * kDepth / kVector / kThreads;

  struct State {
    int pixel;  // of the next copy
    int channels[kCopiesB];
    float sums[Tile::kMmasM][Tile::kMmasN][4];
    uint32_t a[Tile::kMmasM][4], b[Tile::kMmasN][2];
  };

  struct Plan {
    int first_row, first_column, tap_h, tap_w, used, chunk, first_pixel, end_pixel, steps;
  };

  BAP_HOST_DEVICE static int taps(const WeightGradientParams& p) { return p.axis_h.kernel * p.axis_w.kernel; }
  BAP_HOST_DEVICE static int column_tiles(const WeightGradientParams& p) { return ceil_div(p.columns, Tile::kColumns); }
  BAP_HOST_DEVICE static int pixels(const WeightGradientParams& p) {
    return p.batch * p.axis_h.output * p.axis_w.output;
  }
  BAP_HOST_DEVICE static int grid_x(const WeightGradientParams& p) {
    return taps(p) * column_tiles(p) * ceil_div(p.rows, Tile::kRows);
  }
  BAP_HOST_DEVICE static int grid_y(const WeightGradientParams& p) { return ceil_div(pixels(p), p.pixels_per_chunk); }

  BAP_DEVICE static Plan make_plan(const WeightGradientParams& p, int block_x, int block_y) {
    Plan plan;
    const int tap = block_x % taps(p), tile = block_x / taps(p);
    plan.tap_h = tap / p.axis_w.kernel;
    plan.tap_w = tap % p.axis_w.kernel;
    plan.first_column = tile % column_tiles(p) * Tile::kColumns;
    plan.first_row = tile / column_tiles(p) * Tile::kRows;
    plan.used = p.used != nullptr ? *p.used : p.columns;
    plan.chunk = block_y;
    plan.first_pixel = block_y * p.pixels_per_chunk;
    const int left = pixels(p) - plan.first_pixel;
    plan.end_pixel = plan.first_pixel + (left < p.pixels_per_chunk ? left : p.pixels_per_chunk);
    plan.steps = ceil_div(plan.end_pixel - plan.first_pixel, kDepth);
    return plan;
  }

  template <class Block>
  BAP_DEVICE static void begin(Block&, const WeightGradientParams& p, const Plan& plan, int thread, State& s) {
    s.pixel = plan.first_pixel + copy_depth<kThreads, kBytes>(thread);
    BAP_UNROLL
    for (int i = 0; i < kCopiesB; ++i) {
      const int k = plan.first_column + copy_depth_chunk<kThreads, kBytes>(thread, i) * kVector;
      s.channels[i] = k < plan.used ? listed_channel(p.source_list.entries, p.source_list.block, k) : 0;
    }
  }

  template <class Block>
  BAP_DEVICE static void copy(Block& b, const WeightGradientParams& p, const Plan& plan, int thread, State& s,
                              int stage) {
    const scalar_t* grad = static_cast<const scalar_t*>(p.grad);
    const scalar_t* source = static_cast<const scalar_t*>(p.source);
    const bool there = s.pixel < plan.end_pixel;
    const RowPlace at = row_place(there ? s.pixel : 0, p.axis_h.output, p.axis_w.output);
    const int h = at.row * p.axis_h.stride - p.axis_h.before + plan.tap_h * p.axis_h.dilation;
    const int w = at.column * p.axis_w.stride - p.axis_w.before + plan.tap_w * p.axis_w.dilation;
    const bool inside = there && within(h, p.axis_h.input) && within(w, p.axis_w.input);
    const int64_t from_grad = at.image * p.grad_stride.n + at.row * p.grad_stride.h + at.column * p.grad_stride.w;
    const int64_t from_source = at.image * p.source_stride.n + h * p.source_stride.h + w * p.source_stride.w;
    const int depth = copy_depth<kThreads, kBytes>(thread);
    BAP_UNROLL
    for (int i = 0; i < kCopiesA; ++i) {
      const int chunk = copy_depth_chunk<kThreads, kBytes>(thread, i);
      const int row = plan.first_row + chunk * kVector;
      const int bytes = there ? chunk_bytes<kBytes>(row, p.rows) : 0;
      b.copy_chunk(thread, stage + by_depth<Tile::kRows, kBytes>(depth, chunk),
                   bytes > 0 ? grad + from_grad + row : grad, bytes);
    }
    BAP_UNROLL
    for (int i = 0; i < kCopiesB; ++i) {
      const int chunk = copy_depth_chunk<kThreads, kBytes>(thread, i);
      const int column = plan.first_column + chunk * kVector;
      const int bytes = inside ? chunk_bytes<kBytes>(column, plan.used) : 0;
      b.copy_chunk(thread, stage + Tile::kColumnsAt + by_depth<Tile::kColumns, kBytes>(depth, chunk),
                   bytes > 0 ? source + from_source + s.channels[i] : source, bytes);
    }
    s.pixel += kDepth;
  }

  template <class Block>
  BAP_DEVICE static void prepare(Block&, const WeightGradientParams&, const Plan&, int) {}

  template <class Block>
  BAP_DEVICE static void load(Block& b, const Plan&, int thread, State& s, int, int stage, int slice) {
    load_fragments_a<Tile, kBytes, true>(b, thread, s, stage, slice);
    load_fragments_b<Tile, kBytes, true>(b, thread, s, stage + Tile::kColumnsAt, slice);
  }

  BAP_DEVICE static void store(const WeightGradientParams& p, const Plan& plan, int thread, const State& s) {
    const int lane = thread % kWarp, warp = thread / kWarp;
    const int tap = plan.tap_h * p.axis_w.kernel + plan.tap_w;
    BAP_UNROLL
    for (int i = 0; i < Tile::kMmasM; ++i) {
      BAP_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int row =
            plan.first_row + warp / Tile::kWarpsN * Tile::kWarpRows + i * kMmaRows + fragment_row_c(lane, r);
        if (row >= p.rows) continue;
        float* line = p.partial + ((static_cast<int64_t>(plan.chunk) * p.rows + row) * taps(p) + tap) * p.columns;
        BAP_UNROLL
        for (int j = 0; j < Tile::kMmasN; ++j) {
          const int column = plan.first_column + warp % Tile::kWarpsN * Tile::kWarpColumns + j * kMmaColumns +
                             fragment_column_c(lane, r);
          if (column < plan.used) line[column] = s.sums[i][j][r];
        }
      }
    }
  }

  template <class Block>
  BAP_DEVICE static void run(Block& b, const WeightGradientParams& p) {
    const Plan plan = make_plan(p, b.block_x(), b.block_y());
    if (plan.first_column >= plan.used) return;
    sum_products<WeightGradient>(b, p, plan);
    b.each([&](int thread, State& s) { store(p, plan, thread, s); });
  }
};

}  // namespace bap_kernels
