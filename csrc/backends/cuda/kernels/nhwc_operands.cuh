// The implicit GEMM over NHWC sources, for the forward and for the input's gradient: which rows and columns a block
// computes, and how a thread copies both operands of a step. The kernels that multiply by mma.sync
// (gathered_conv2d.cuh) and by wgmma (warpgroup_conv2d.cuh) share it.
//
// Row tiles run over all pixels of a run of images; grid (tiles of all runs, phases along w, phases along h * parts of
// the sum). A step is 128 bytes of channels at one tap: channels in blocks outside, taps inside. A thread copies one
// chunk of channels for several pixels: one look-up in the list per thread and block of channels.
#pragma once

#include "backends/cuda/kernels/epilogue.cuh"

namespace bap_kernels {

template <class Tile>
BAP_HOST_DEVICE int row_tiles(const ConvParams& p, int images) {
  return ceil_div(p.pixels * images, Tile::kRows);
}

// The parameters of a launch with this tile.
template <class Tile>
ConvParams with_tiles(ConvParams p) {
  p.column_tiles = divisor_of(ceil_div(p.columns, Tile::kColumns));
  return p;
}
template <class Tile>
dim3 nhwc_grid(const ConvParams& p, int parts) {
  int tiles = 0;
  for (int run = 0; run < p.runs.count; ++run) tiles += row_tiles<Tile>(p, p.runs.of[run].images);
  return dim3(tiles * ceil_div(p.columns, Tile::kColumns), p.phases_w, p.phases_h * parts);
}

// What a block computes.
struct NhwcPlan {
  const AxisPlan &h, &w;
  TilePlace tile;
  int phase, part;                                       // `phase`: its number among those of all launches
  int run, rows, first_row, first_column, image, depth;  // `image`: the first that rows count from
  int first_step, steps;
};

// `parts` of the grid: blockIdx.z counts them for each phase along h.
template <class Tile, int kElementBytes, bool kGradient>
__device__ __forceinline__ NhwcPlan nhwc_plan(const ConvParams& p, const Divisor& parts) {
  const int phase_h = kGradient ? parts.quotient(blockIdx.z) : 0, phase_w = kGradient ? blockIdx.y : 0;
  NhwcPlan plan{p.plans_h[phase_h], p.plans_w[phase_w]};
  plan.phase = (p.first_phase_h + phase_h) * p.axis_w.stride + p.first_phase_w + phase_w;
  plan.part = parts.rest(blockIdx.z, phase_h);
  int block = blockIdx.x, tiles = row_tiles<Tile>(p, p.runs.of[0].images) * p.column_tiles.count();
  plan.run = 0;
  while (plan.run + 1 < p.runs.count && block >= tiles) {
    block -= tiles;
    tiles = row_tiles<Tile>(p, p.runs.of[++plan.run].images) * p.column_tiles.count();
  }
  const BatchRun& run = p.runs.of[plan.run];
  plan.image = run.first;
  plan.tile = tile_place(block, row_tiles<Tile>(p, run.images), p.column_tiles);
  plan.rows = plan.h.count.count() * plan.w.count.count() * run.images;
  plan.first_row = plan.tile.row * Tile::kRows;
  plan.first_column = plan.tile.column * Tile::kColumns;
  plan.depth = p.depth != nullptr ? *p.depth : run.depth;
  const int steps = ceil_div(plan.depth, kDepthBytes / kElementBytes) * plan.h.taps.count() * plan.w.taps.count();
  plan.first_step = parts.quotient(plan.part * steps);
  plan.steps = parts.quotient((plan.part + 1) * steps) - plan.first_step;
  return plan;
}

// The copies of kColumns filters by one of kThreads threads: 128 bytes of depth of each at one tap. A thread keeps its
// chunk of the depth and takes filters that are kThreads / 8 apart.
template <typename scalar_t, int kColumns, int kThreads>
struct FilterCopies {
  static constexpr int kBlock = kDepthBytes / sizeof(scalar_t);  // from a block of channels to the next
  static constexpr int kCopies = kColumns * kDepthChunks / kThreads, kStep = kThreads / kDepthChunks;
  static_assert(kStep % 8 == 0, "the same swizzle for all filters of a thread");

  const scalar_t* first;  // the thread's chunk of its first filter
  int64_t step;           // from a filter of the thread to the next
  int left;               // columns from the first one on

  __device__ __forceinline__ void begin(const BatchRun& run, int first_column, int columns, int thread) {
    const int column = first_column + copy_row<kThreads>(thread, 0);
    first = static_cast<const scalar_t*>(run.weight) + column * run.stride_weight_column +
            copy_chunk(thread) * (kChunkBytes / static_cast<int>(sizeof(scalar_t)));
    step = kStep * run.stride_weight_column;
    left = columns - column;
  }
  // Starts the copies, from element `move` of each filter on, into the columns that begin at byte `to`.
  template <bool kWhole>
  __device__ __forceinline__ void copy(int to, int64_t move, int bytes, int thread) const {
    to += by_rows(copy_row<kThreads>(thread, 0), copy_chunk(thread));
    const scalar_t* from = first + move;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      copy_chunk_unless<kWhole>(i * kStep >= left, to + i * kStep * kDepthBytes, from, bytes);
      from += step;
    }
  }
};

// The copies of one of kThreads threads, step by step: of rows, and what `Filters` copies.
template <typename scalar_t, class Tile, int kThreads, class Filters>
struct NhwcOperands {
  static constexpr int kBytes = sizeof(scalar_t);
  static constexpr int kVector = kChunkBytes / kBytes;
  static constexpr int kDepth = kDepthBytes / kBytes;
  static constexpr int kCopies = Tile::kRows * kDepthChunks / kThreads, kStep = kThreads / kDepthChunks;
  static_assert(kStep % 8 == 0, "the same swizzle for all rows of a thread");

  const scalar_t* pixel[kCopies];  // of each row, at the first tap
  // Taps of each row that fall outside of the source: a bit for each row of taps, then one for each column of taps.
  uint32_t outside[kCopies];
  Filters filters;
  int channel, next_channel;  // that the thread copies in this block of channels, and in the next
  StepWalk step;

  // The channel that the thread copies in a block of channels; any that is there where it copies none.
  __device__ __forceinline__ static int look_up(const ConvParams& p, const NhwcPlan& plan, int block, int thread) {
    const int k = block * kDepth + copy_chunk(thread) * kVector;
    return k < plan.depth ? listed_channel(p.runs.of[plan.run].list, k) : 0;
  }

  __device__ __forceinline__ void begin(const ConvParams& p, const NhwcPlan& plan, int thread) {
    int row_h[kCopies], row_w[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int m = plan.first_row + copy_row<kThreads>(thread, i);
      const RowPlace at = row_place(m, plan.h.count, plan.w.count);
      row_h[i] = at.row * plan.h.source_step + plan.h.source_first;
      row_w[i] = at.column * plan.w.source_step + plan.w.source_first;
      outside[i] = m < plan.rows ? 0 : ~uint32_t{0};
      pixel[i] = static_cast<const scalar_t*>(p.source) + (plan.image + at.image) * p.source_stride.n +
                 row_h[i] * p.source_stride.h + row_w[i] * p.source_stride.w;
      // Computed here: the compiler would rather do it for each step anew.
      asm volatile("" : "+l"(pixel[i]));
    }
#pragma unroll 1
    for (int tap = 0; tap < plan.h.taps.count(); ++tap) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (!within(row_h[i] + tap * plan.h.tap_step, plan.h.source_size)) outside[i] |= 1u << tap;
      }
    }
#pragma unroll 1
    for (int tap = 0; tap < plan.w.taps.count(); ++tap) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const uint32_t bit = 1u << (plan.h.taps.count() + tap);
        if (!within(row_w[i] + tap * plan.w.tap_step, plan.w.source_size)) outside[i] |= bit;
      }
    }
    filters.begin(p.runs.of[plan.run], plan.first_column, p.columns, thread);
    step = step_at(plan.first_step, plan.h, plan.w, p.source_stride.h, p.source_stride.w, p.kernel_w,
                   p.runs.of[plan.run].stride_weight_tap, Filters::kBlock);
    channel = look_up(p, plan, step.block, thread);
    next_channel = look_up(p, plan, step.block + 1, thread);
  }

  // Starts the copies of the next step into the stage that begins at byte `to`: the rows, then the columns.
  __device__ __forceinline__ void copy(const ConvParams& p, const NhwcPlan& plan, int to, int thread) {
    const int k = step.block * kDepth;
    if (k + kDepth <= plan.depth) {
      copy_chunks<true>(plan, to, kChunkBytes, thread);
    } else {
      copy_chunks<false>(plan, to, chunk_bytes<kBytes>(k + copy_chunk(thread) * kVector, plan.depth), thread);
    }
    if (advance(step, plan.h, plan.w, p.source_stride.h, p.source_stride.w, p.kernel_w,
                p.runs.of[plan.run].stride_weight_tap, Filters::kBlock)) {
      channel = next_channel;
      next_channel = look_up(p, plan, step.block + 1, thread);
    }
  }

 private:
  template <bool kWhole>
  __device__ __forceinline__ void copy_chunks(const NhwcPlan& plan, int to, int bytes, int thread) const {
    const int rows_to = to + by_rows(copy_row<kThreads>(thread, 0), copy_chunk(thread));
    const uint32_t taps = 1u << step.tap_h | 1u << (plan.h.taps.count() + step.tap_w);
    const int64_t move = step.source + channel;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool skip = (outside[i] & taps) != 0;
      copy_chunk_unless<kWhole>(skip, rows_to + i * kStep * kDepthBytes, pixel[i] + move, bytes);
    }
    filters.template copy<kWhole>(to + Tile::kColumnsAt, step.filter, bytes, thread);
  }
};

// Where the first of a tile's sums lies among those of a part.
__device__ __forceinline__ float* partial_sums(const ConvParams& p, const NhwcPlan& plan, int part) {
  const int64_t row = static_cast<int64_t>(plan.image) * p.pixels + plan.first_row;
  return p.parts.sums + part * p.parts.stride_part + plan.phase * p.parts.stride_phase + row * p.parts.stride_row +
         plan.first_column;
}

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

// What stands between staged sums and their store: tables of the tile's rows, and of the places of its columns in a
// copy. `sync` is a barrier of the tile's threads.
template <typename scalar_t, class Tile, class Sync>
__device__ __forceinline__ void prepare_store(const ConvParams& p, const NhwcPlan& plan, Sync sync) {
  using Epilogue = Epilogue<scalar_t, Tile, false>;
  write_rows<scalar_t, Tile>(p, plan);
  if (p.copy != nullptr) Epilogue::clear_places();
  sync();
  if (p.copy != nullptr) {
    Epilogue::find_places(p, plan.first_column);
    sync();
  }
}

// Reduces or stores a tile of the mma.sync kernel from its staged sums.
template <typename scalar_t, class Tile>
__device__ __forceinline__ void finish_tile(const ConvParams& p, const NhwcPlan& plan) {
  using Epilogue = Epilogue<scalar_t, Tile, false>;
  prepare_store<scalar_t, Tile>(p, plan, [] { __syncthreads(); });
  if (p.partial != nullptr) {
    Epilogue::reduce(p, plan.first_column, int64_t{plan.phase} * row_tiles<Tile>(p, p.batch) + plan.tile.row);
  }
  if (p.result != nullptr) Epilogue::store(p, plan.first_column);
}

}  // namespace bap_kernels
