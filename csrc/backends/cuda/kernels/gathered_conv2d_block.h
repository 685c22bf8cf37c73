// What one block of the gathered convolution computes: an implicit GEMM, for the forward and for the input's gradient.
//   result[m, j] = relu?(scale[j] * (sum over k, t of source[pixel(m, t), channel(k)] * weight[j, t, k] + bias[o])
//                        + shift[j] + residual[m, j])                                            with o =
//                        result_list[j]
// A row m is a pixel of the result, a column j one of its channels; k runs over channels, t over taps
// (conv_geometry.h).
//
// kPlanes false: source in NHWC. Row tiles run over all pixels of the batch; grid (tiles, phases). A thread copies one
//   chunk of channels for several pixels: one look-up in the list per thread and block of channels.
// kPlanes true:  1x1 convolutions of planes; row tiles run over the pixels of one image; grid (tiles, images). A thread
//   copies several chunks of pixels of one channel: any list costs one look-up per thread and block of channels.
// Shared memory: kStages of both operands, filled kStages - 1 steps ahead; then the result in float32 and offsets.
// Needs:  16-byte aligned chunks of source and weight; `block` of the source's list 0 or a multiple of a chunk, with
//   kPlanes also 1; lists within range; batch * pixels below 2^31.
// Allows: any strides of result, residual and input, with int64 offsets; counts on the device.
// Accumulates in float32. No atomics: the result does not vary between runs.
//
// It is written against a Block, which is the device (device_block.cuh) or, in tests, a simulation that runs the same
// text on the host: `each` runs a function for every thread; what follows it sees its shared memory after `sync`.
#pragma once

#include "backends/cuda/kernels/conv_epilogue.h"
#include "backends/cuda/kernels/pipeline.h"

namespace bap_kernels {

template <MathMode kMode_, class Tile_, bool kPlanes_>
struct GatheredConv2d {
  using Tile = Tile_;
  using scalar_t = typename MathTraits<kMode_>::scalar_t;
  static constexpr MathMode kMode = kMode_;
  static constexpr bool kPlanes = kPlanes_;
  static constexpr int kBytes = sizeof(scalar_t);
  static constexpr int kVector = kChunkBytes / kBytes;
  static constexpr int kDepth = kDepthBytes / kBytes;
  static constexpr int kThreads = Tile::kThreads, kStages = Tile::kStages, kStageBytes = Tile::kStageBytes;
  static constexpr int kRowStep = kThreads / kDepthChunks;
  static constexpr int kCopiesA = Tile::kRows / kRowStep, kCopiesB = Tile::kColumns / kRowStep;
  static constexpr int kGroup = 8;
  using Epilogue = ConvEpilogue<scalar_t, Tile, kPlanes>;

  // What a thread keeps.
  struct State {
    int64_t source[kPlanes ? 1 : kCopiesA];  // offset of each row's pixel at the first tap; of the image's planes
    int row_h[kPlanes ? 1 : kCopiesA], row_w[kPlanes ? 1 : kCopiesA];
    int channel, next_channel;
    StepCursor cursor;
    float sums[Tile::kMmasM][Tile::kMmasN][4];
    uint32_t a[Tile::kMmasM][4], b[Tile::kMmasN][2];
  };

  // What a block knows.
  struct Plan {
    AxisPlan h, w;
    TilePlace place;
    int run, rows, first_row, first_column, image, depth, steps;  // `image`: the first that rows count from
  };

  BAP_HOST_DEVICE static int row_tiles(const ConvParams& p, int images) {
    const int rows_h = p.gradient ? ceil_div(p.axis_h.input, p.axis_h.stride) : p.axis_h.output;
    const int rows_w = p.gradient ? ceil_div(p.axis_w.input, p.axis_w.stride) : p.axis_w.output;
    return ceil_div(rows_h * rows_w * (kPlanes ? 1 : images), Tile::kRows);
  }
  BAP_HOST_DEVICE static int column_tiles(const ConvParams& p) { return ceil_div(p.columns, Tile::kColumns); }
  BAP_HOST_DEVICE static int grid_x(const ConvParams& p) {
    if (kPlanes) return row_tiles(p, 1) * column_tiles(p);
    int tiles = 0;
    for (int run = 0; run < p.runs.count; ++run) tiles += row_tiles(p, p.runs.of[run].images);
    return tiles * column_tiles(p);
  }
  BAP_HOST_DEVICE static int grid_y(const ConvParams& p) {
    return kPlanes ? p.batch : p.gradient ? p.axis_h.stride * p.axis_w.stride : 1;
  }

  BAP_DEVICE static Plan make_plan(const ConvParams& p, int block_x, int block_y) {
    Plan plan;
    const int phase = kPlanes ? 0 : block_y;
    plan.h = p.gradient ? gradient_axis(p.axis_h, phase / p.phases_w) : forward_axis(p.axis_h);
    plan.w = p.gradient ? gradient_axis(p.axis_w, phase % p.phases_w) : forward_axis(p.axis_w);
    int images = 1;
    if constexpr (kPlanes) {
      const ImagePlace at = image_place(p.runs, block_y);
      plan.run = at.run;
      plan.image = at.image;
    } else {
      plan.run = 0;
      int tiles = row_tiles(p, p.runs.of[0].images) * column_tiles(p);
      while (plan.run + 1 < p.runs.count && block_x >= tiles) {
        block_x -= tiles;
        tiles = row_tiles(p, p.runs.of[++plan.run].images) * column_tiles(p);
      }
      plan.image = p.runs.of[plan.run].first;
      images = p.runs.of[plan.run].images;
    }
    plan.place = tile_place(block_x, row_tiles(p, images), column_tiles(p), kGroup);
    plan.rows = plan.h.count * plan.w.count * images;
    plan.first_row = plan.place.row * Tile::kRows;
    plan.first_column = plan.place.column * Tile::kColumns;
    plan.depth = p.depth != nullptr ? *p.depth : p.runs.of[plan.run].depth;
    plan.steps = ceil_div(plan.depth, kDepth) * plan.h.taps * plan.w.taps;
    return plan;
  }

  // The channel that a thread copies in a block of channels; any that is there where it copies none.
  BAP_DEVICE static int look_up(const ConvParams& p, const Plan& plan, int thread, int block) {
    const int within_block = kPlanes ? copy_depth<kThreads, kBytes>(thread) : copy_chunk(thread) * kVector;
    const int k = block * kDepth + within_block;
    const ListParams& list = p.runs.of[plan.run].list;
    return k < plan.depth ? listed_channel(list.entries, list.block, k) : 0;
  }

  template <class Block>
  BAP_DEVICE static void begin(Block&, const ConvParams& p, const Plan& plan, int thread, State& s) {
    if constexpr (kPlanes) {
      s.source[0] = plan.image * p.source_stride.n;
    } else {
      BAP_UNROLL
      for (int i = 0; i < kCopiesA; ++i) {
        const int m = plan.first_row + copy_row<kThreads>(thread, i);
        s.source[i] = 0;
        s.row_h[i] = -(1 << 30);  // never within the source
        s.row_w[i] = 0;
        if (m < plan.rows) {
          const RowPlace at = row_place(m, plan.h.count, plan.w.count);
          s.row_h[i] = at.row * plan.h.source_step + plan.h.source_first;
          s.row_w[i] = at.column * plan.w.source_step + plan.w.source_first;
          s.source[i] = (plan.image + at.image) * p.source_stride.n + s.row_h[i] * p.source_stride.h +
                        s.row_w[i] * p.source_stride.w;
        }
      }
    }
    s.cursor = {0, 0, 0};
    s.channel = look_up(p, plan, thread, 0);
    s.next_channel = look_up(p, plan, thread, 1);
  }

  // Starts the thread's copies of the step at its cursor into a stage, and moves the cursor on.
  template <class Block>
  BAP_DEVICE static void copy(Block& b, const ConvParams& p, const Plan& plan, int thread, State& s, int stage) {
    const scalar_t* source = static_cast<const scalar_t*>(p.source);
    const BatchRun& run = p.runs.of[plan.run];
    const scalar_t* weight = static_cast<const scalar_t*>(run.weight);
    const int k = s.cursor.block * kDepth;
    if constexpr (kPlanes) {
      const int depth = copy_depth<kThreads, kBytes>(thread);
      const int64_t plane = s.source[0] + s.channel * p.source_stride.c;
      BAP_UNROLL
      for (int i = 0; i < Tile::kRows * kDepth / kVector / kThreads; ++i) {
        const int chunk = copy_depth_chunk<kThreads, kBytes>(thread, i);
        const int pixel = plan.first_row + chunk * kVector;
        const int bytes = k + depth < plan.depth ? chunk_bytes<kBytes>(pixel, plan.rows) : 0;
        b.copy_chunk(thread, stage + by_depth<Tile::kRows, kBytes>(depth, chunk),
                     bytes > 0 ? source + plane + pixel : source, bytes);
      }
    } else {
      const int chunk = copy_chunk(thread);
      const int there = chunk_bytes<kBytes>(k + chunk * kVector, plan.depth);
      const int move_h = s.cursor.tap_h * plan.h.tap_step, move_w = s.cursor.tap_w * plan.w.tap_step;
      const int64_t move = move_h * p.source_stride.h + move_w * p.source_stride.w + s.channel;
      BAP_UNROLL
      for (int i = 0; i < kCopiesA; ++i) {
        const bool inside =
            within(s.row_h[i] + move_h, plan.h.source_size) && within(s.row_w[i] + move_w, plan.w.source_size);
        const int bytes = inside ? there : 0;
        b.copy_chunk(thread, stage + by_rows(copy_row<kThreads>(thread, i), chunk),
                     bytes > 0 ? source + s.source[i] + move : source, bytes);
      }
    }
    const int chunk = copy_chunk(thread);
    const int there = chunk_bytes<kBytes>(k + chunk * kVector, plan.depth);
    const int tap = (plan.h.weight_first + s.cursor.tap_h * plan.h.weight_step) * p.kernel_w + plan.w.weight_first +
                    s.cursor.tap_w * plan.w.weight_step;
    const int64_t move = tap * run.stride_weight_tap + k + chunk * kVector;
    BAP_UNROLL
    for (int i = 0; i < kCopiesB; ++i) {
      const int row = copy_row<kThreads>(thread, i);
      const int column = plan.first_column + row;
      const int bytes = column < p.columns ? there : 0;
      b.copy_chunk(thread, stage + Tile::kColumnsAt + by_rows(row, chunk),
                   bytes > 0 ? weight + column * run.stride_weight_column + move : weight, bytes);
    }
    if (advance(s.cursor, plan.h.taps, plan.w.taps)) {
      s.channel = s.next_channel;
      s.next_channel = look_up(p, plan, thread, s.cursor.block + 1);
    }
  }

  template <class Block>
  BAP_DEVICE static void prepare(Block&, const ConvParams&, const Plan&, int) {}

  template <class Block>
  BAP_DEVICE static void load(Block& b, const Plan&, int thread, State& s, int, int stage, int slice) {
    load_fragments_a<Tile, kBytes, kPlanes>(b, thread, s, stage, slice);
    load_fragments_b<Tile, kBytes, false>(b, thread, s, stage + Tile::kColumnsAt, slice);
  }

  template <class Block>
  BAP_DEVICE static void write_table(Block& b, const ConvParams& p, const Plan& plan, int thread) {
    for (int row = thread; row < Tile::kRows; row += kThreads) {
      const int m = plan.first_row + row;
      const bool there = m < plan.rows;
      const RowPlace at = row_place(there ? m : 0, plan.h.count, plan.w.count);
      Epilogue::write_row(b, p, thread, row, there, plan.image + at.image,
                          at.row * plan.h.result_step + plan.h.result_first,
                          at.column * plan.w.result_step + plan.w.result_first);
    }
  }

  template <class Block>
  BAP_DEVICE static void run(Block& b, const ConvParams& p) {
    const Plan plan = make_plan(p, b.block_x(), b.block_y());
    if (plan.first_column >= Epilogue::stored_columns(p) && !p.reduce_off) return;
    sum_products<GatheredConv2d>(b, p, plan);
    b.sync();
    b.each([&](int thread, State& s) {
      Epilogue::stage_sums(b, thread, s);
      write_table(b, p, plan, thread);
      if (p.copy != nullptr) Epilogue::clear_places(b, thread);
    });
    b.sync();
    if (p.copy != nullptr) {
      b.each([&](int thread, State&) { Epilogue::find_places(b, p, plan.first_column, thread); });
      b.sync();
    }
    b.each([&](int thread, State&) {
      if (p.partial != nullptr) {
        const int64_t term = static_cast<int64_t>(b.block_y()) * row_tiles(p, p.batch) + plan.place.row;
        Epilogue::reduce(b, p, plan.first_column, term, thread);
      }
      if (p.result != nullptr) Epilogue::store(b, p, plan.first_column, thread);
    });
  }
};

}  // namespace bap_kernels
