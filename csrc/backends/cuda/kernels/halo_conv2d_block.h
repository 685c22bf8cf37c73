// What one block of the convolution with a halo computes: the forward for any list and any strides of the source.
//   result[m, j] = relu?(scale[j] * (sum over k, t of source[pixel(m, t), channel(k)] * weight[j, t, k] + bias[o])
//                        + shift[j] + residual[m, j])    with o = result_list[j]
// A row m is a pixel of a tile of one image, a column j a channel of the result; k runs over channels, t over taps.
//
// The halo of the tile (halo_shape.h) is loaded once for each block of channels and serves all taps: the listed
// channels lie side by side in shared memory, as matrix loads want them, whatever the list.
//   staged: planes are copied asynchronously as they lie, one look-up per thread and block of channels, while the block
//           before is multiplied; then turned into the halo, from shared memory to shared memory
//   else:   elements are gathered into the halo one by one, along pixels or channels, whichever lie side by side; other
//           blocks of the SM must hide the wait
// Grid: (tiles * column tiles, images). Shared memory: kStages of the weight, the halo, the staged planes; then the
//   result in float32 and offsets.
// Needs:  at least two taps, so that a staged block has arrived when it is turned; lists within range; for staging
//   what halo_copy_bytes says. A halo that fits: choose_halo.
// Allows: any strides of source, result and residual, with int64 offsets; a count of channels on the device; within the
//   source a prologue, x' = relu?(source_scale[k] * x + source_shift[k]).
// Accumulates in float32. No atomics: the result does not vary between runs.
#pragma once

#include "backends/cuda/kernels/conv_epilogue.h"
#include "backends/cuda/kernels/halo_shape.h"
#include "backends/cuda/kernels/pipeline.h"

namespace bap_kernels {

template <MathMode kMode_, class Tile_>
struct HaloConv2d {
  using Tile = Tile_;
  using Memory = HaloMemory<Tile>;
  using scalar_t = typename MathTraits<kMode_>::scalar_t;
  static constexpr MathMode kMode = kMode_;
  static constexpr int kBytes = sizeof(scalar_t);
  static constexpr int kVector = kChunkBytes / kBytes;
  static constexpr int kDepth = kDepthBytes / kBytes;
  static constexpr int kThreads = Tile::kThreads, kStages = Tile::kStages, kStageBytes = Memory::kStageBytes;
  static constexpr int kCopies = Tile::kColumns / (kThreads / kDepthChunks);
  static constexpr int kChannelThreads = depth_threads<kThreads, kBytes>();
  static constexpr int kGroup = 8;
  static_assert(kStages <= 3, "what is staged at a block's first step arrives within two taps");
  using Rows = ConvEpilogue<scalar_t, Tile, false>;
  using Planes = ConvEpilogue<scalar_t, Tile, true>;

  struct State {
    int channel, next_channel;  // that the thread stages
    StepCursor cursor;
    float sums[Tile::kMmasM][Tile::kMmasN][4];
    uint32_t a[Tile::kMmasM][4], b[Tile::kMmasN][2];
  };

  struct Plan {
    int run, first_h, first_w, first_column, image, depth, taps, steps;
    int source_h, source_w;  // the halo's first pixel in the source
    HaloShape shape;
    ConvAxis h, w;
  };

  BAP_HOST_DEVICE static int tiles_h(const HaloParams& p) { return ceil_div(p.conv.axis_h.output, p.shape.tile_h); }
  BAP_HOST_DEVICE static int tiles_w(const HaloParams& p) { return ceil_div(p.conv.axis_w.output, p.shape.tile_w); }
  BAP_HOST_DEVICE static int column_tiles(const HaloParams& p) { return ceil_div(p.conv.columns, Tile::kColumns); }
  BAP_HOST_DEVICE static int grid_x(const HaloParams& p) { return tiles_h(p) * tiles_w(p) * column_tiles(p); }
  BAP_HOST_DEVICE static int grid_y(const HaloParams& p) { return p.conv.batch; }

  BAP_DEVICE static Plan make_plan(const HaloParams& p, int block_x, int block_y) {
    Plan plan;
    const TilePlace place = tile_place(block_x, tiles_h(p) * tiles_w(p), column_tiles(p), kGroup);
    plan.shape = p.shape;
    plan.h = p.conv.axis_h;
    plan.w = p.conv.axis_w;
    plan.first_h = place.row / tiles_w(p) * p.shape.tile_h;
    plan.first_w = place.row % tiles_w(p) * p.shape.tile_w;
    plan.first_column = place.column * Tile::kColumns;
    const ImagePlace at = image_place(p.conv.runs, block_y);
    plan.run = at.run;
    plan.image = at.image;
    plan.source_h = plan.first_h * plan.h.stride - plan.h.before;
    plan.source_w = plan.first_w * plan.w.stride - plan.w.before;
    plan.depth = p.conv.depth != nullptr ? *p.conv.depth : p.conv.runs.of[plan.run].depth;
    plan.taps = plan.h.kernel * plan.w.kernel;
    plan.steps = ceil_div(plan.depth, kDepth) * plan.taps;
    return plan;
  }

  BAP_DEVICE static int look_up(const HaloParams& p, const Plan& plan, int k) {
    const ListParams& list = p.conv.runs.of[plan.run].list;
    return k < plan.depth ? listed_channel(list.entries, list.block, k) : 0;
  }
  BAP_DEVICE static int staged_channel(const HaloParams& p, const Plan& plan, int thread, int block) {
    return look_up(p, plan, block * kDepth + copy_depth<kThreads, kBytes>(thread));
  }

  template <class Block>
  BAP_DEVICE static void begin(Block& b, const HaloParams& p, const Plan& plan, int thread, State& s) {
    s.cursor = {0, 0, 0};
    s.channel = staged_channel(p, plan, thread, 0);
    s.next_channel = staged_channel(p, plan, thread, 1);
    if (plan.shape.copy_bytes > 0) stage(b, p, plan, thread, s, 0);
  }

  // Starts the thread's copies of the planes of a block of channels: of one channel, some of each row's.
  template <int kWidth, class Block>
  BAP_DEVICE static void stage_planes(Block& b, const HaloParams& p, const Plan& plan, int thread, const State& s,
                                      int block) {
    constexpr int kUnit = kWidth / kBytes;
    const int depth = copy_depth<kThreads, kBytes>(thread);
    if (depth >= plan.shape.staged_channels) return;
    const scalar_t* source = static_cast<const scalar_t*>(p.conv.source);
    const Strides& stride = p.conv.source_stride;
    const scalar_t* plane = source + plan.image * stride.n + s.channel * stride.c;
    const bool there = block * kDepth + depth < plan.depth;
    const int first = plan.source_w - plan.shape.lead;
    const int units = plan.shape.units;
    int to = Memory::staged_at(plan.shape) + depth * plan.shape.rows * plan.shape.row_bytes();
    int unit = thread % kChannelThreads, row = 0;
    to += unit * kWidth;
    while (unit >= units) unit -= units, ++row;
    while (row < plan.shape.rows) {
      const int h = plan.source_h + row, w = first + unit * kUnit;
      const bool inside = there && within(h, plan.h.input) && within(w, plan.w.input);
      const int left = (plan.w.input - w) * kBytes;
      const int bytes = !inside ? 0 : left < kWidth ? left : kWidth;
      b.template copy_part<kWidth>(thread, to, bytes > 0 ? plane + h * stride.h + w : source, bytes);
      to += kChannelThreads * kWidth;
      unit += kChannelThreads;
      while (unit >= units) unit -= units, ++row;
    }
  }

  template <class Block>
  BAP_DEVICE static void stage(Block& b, const HaloParams& p, const Plan& plan, int thread, State& s, int block) {
    if (plan.shape.copy_bytes == 16) {
      stage_planes<16>(b, p, plan, thread, s, block);
    } else if (plan.shape.copy_bytes == 8) {
      stage_planes<8>(b, p, plan, thread, s, block);
    } else {
      stage_planes<4>(b, p, plan, thread, s, block);
    }
    s.channel = s.next_channel;
    s.next_channel = staged_channel(p, plan, thread, block + 2);
  }

  // Starts the thread's copies of the weight of the step at its cursor, and moves the cursor on.
  template <class Block>
  BAP_DEVICE static void copy(Block& b, const HaloParams& p, const Plan& plan, int thread, State& s, int stage) {
    const BatchRun& run = p.conv.runs.of[plan.run];
    const scalar_t* weight = static_cast<const scalar_t*>(run.weight);
    const int chunk = copy_chunk(thread), k = s.cursor.block * kDepth + chunk * kVector;
    const int there = chunk_bytes<kBytes>(k, plan.depth);
    const int64_t move = (s.cursor.tap_h * plan.w.kernel + s.cursor.tap_w) * run.stride_weight_tap + k;
    BAP_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      const int row = copy_row<kThreads>(thread, i);
      const int column = plan.first_column + row;
      const int bytes = column < p.conv.columns ? there : 0;
      b.copy_chunk(thread, stage + by_rows(row, chunk),
                   bytes > 0 ? weight + column * run.stride_weight_column + move : weight, bytes);
    }
    advance(s.cursor, plan.h.kernel, plan.w.kernel);
  }

  // Calls body(pixel, row, column) for the halo's pixels `first`, `first` + kStep, ...; column as in the source's rows.
  template <int kStep, class Body>
  BAP_DEVICE static void for_pixels(const Plan& plan, int first, Body&& body) {
    int row = 0, place = first;
    for (int pixel = first; pixel < plan.shape.pixels(); pixel += kStep, place += kStep) {
      while (place >= plan.shape.line) place -= plan.shape.line, ++row;
      body(pixel, row, halo_column(plan.shape, plan.w.stride, place));
    }
  }

  // A chunk of the halo on its way to shared memory: elements `k` and on of the list, of a pixel within the source.
  BAP_DEVICE static void enter(const HaloParams& p, const Plan& plan, int k, Chunk<scalar_t>& values) {
    if (!p.prologue) return;
    BAP_UNROLL
    for (int v = 0; v < kVector; ++v) {
      if (k + v < plan.depth) {
        values.values[v] =
            transformed(p.conv.source_scale, p.conv.source_shift, p.conv.source_relu, values.values[v], k + v);
      }
    }
  }
  BAP_DEVICE static bool within_source(const Plan& plan, int row, int column) {
    return column < plan.shape.columns && within(plan.source_h + row, plan.h.input) &&
           within(plan.source_w + column, plan.w.input);
  }

  // Turns the staged planes into the halo: a thread writes one chunk of channels for pixels that are a warp apart.
  template <class Block>
  BAP_DEVICE static void turn(Block& b, const HaloParams& p, const Plan& plan, int thread, int block) {
    const int staged = Memory::staged_at(plan.shape), plane = plan.shape.rows * plan.shape.row_bytes();
    for (int chunk = thread / kWarp; chunk < kDepthChunks; chunk += kThreads / kWarp) {
      const bool there = chunk * kVector < plan.shape.staged_channels;
      for_pixels<kWarp>(plan, thread % kWarp, [&](int pixel, int row, int column) {
        const int from =
            staged + chunk * kVector * plane + row * plan.shape.row_bytes() + (plan.shape.lead + column) * kBytes;
        const bool read = there && column < plan.shape.columns;
        Chunk<scalar_t> values;
        BAP_UNROLL
        for (int v = 0; v < kVector; ++v) {
          values.values[v] = read ? b.template load<scalar_t>(thread, from + v * plane) : from_float<scalar_t>(0.0f);
        }
        if (within_source(plan, row, column)) enter(p, plan, block * kDepth + chunk * kVector, values);
        b.store_chunk(thread, Memory::kHaloAt + by_rows(pixel, chunk), values);
      });
    }
  }

  // Gathers a block of channels into the halo, element by element; zeros outside the source and behind its channels.
  template <int kStep, class Block>
  BAP_DEVICE static void gather_chunk(Block& b, const HaloParams& p, const Plan& plan, int thread, int block, int chunk,
                                      int first) {
    const Strides& stride = p.conv.source_stride;
    const scalar_t* image = static_cast<const scalar_t*>(p.conv.source) + plan.image * stride.n;
    int64_t channels[kVector];
    const int k = block * kDepth + chunk * kVector;
    BAP_UNROLL
    for (int v = 0; v < kVector; ++v) channels[v] = look_up(p, plan, k + v) * stride.c;
    for_pixels<kStep>(plan, first, [&](int pixel, int row, int column) {
      const int h = plan.source_h + row, w = plan.source_w + column;
      const bool inside = within_source(plan, row, column);
      const scalar_t* from = image + h * stride.h + w * stride.w;
      Chunk<scalar_t> values;
      BAP_UNROLL
      for (int v = 0; v < kVector; ++v) {
        values.values[v] = inside && k + v < plan.depth ? from[channels[v]] : from_float<scalar_t>(0.0f);
      }
      if (inside) enter(p, plan, k, values);
      b.store_chunk(thread, Memory::kHaloAt + by_rows(pixel, chunk), values);
    });
  }

  template <class Block>
  BAP_DEVICE static void gather(Block& b, const HaloParams& p, const Plan& plan, int thread, int block) {
    if (p.planes) {
      for (int chunk = thread / kWarp; chunk < kDepthChunks; chunk += kThreads / kWarp) {
        gather_chunk<kWarp>(b, p, plan, thread, block, chunk, thread % kWarp);
      }
    } else {
      gather_chunk<kThreads / kDepthChunks>(b, p, plan, thread, block, copy_chunk(thread), thread / kDepthChunks);
    }
  }

  // Before a block of channels is multiplied: its halo is made, and the planes of the next one are asked for.
  template <class Block>
  BAP_DEVICE static void prepare(Block& b, const HaloParams& p, const Plan& plan, int step) {
    if (step % plan.taps != 0) return;
    const int block = step / plan.taps;
    const bool staged = plan.shape.copy_bytes > 0;
    b.each([&](int thread, State&) {
      if (staged) {
        turn(b, p, plan, thread, block);
      } else {
        gather(b, p, plan, thread, block);
      }
    });
    b.sync();
    // They belong to the group of copies that this step commits.
    if (staged && step + plan.taps < plan.steps) {
      b.each([&](int thread, State& s) { stage(b, p, plan, thread, s, block + 1); });
    }
  }

  template <class Block>
  BAP_DEVICE static void load(Block& b, const Plan& plan, int thread, State& s, int step, int weight, int slice) {
    const int first = thread / kWarp / Tile::kWarpsN * Tile::kWarpRows;
    const int tap = step % plan.taps;
    const int move = halo_tap(plan.shape, plan.h, plan.w, tap / plan.w.kernel, tap % plan.w.kernel);
    BAP_UNROLL
    for (int i = 0; i < Tile::kMmasM; ++i) {
      b.load_matrices(thread, s.a[i], [&](int of) {
        const int pixel = halo_pixel(plan.shape, plan.h.stride, first + i * kMmaRows + matrix_row_a(of)) + move;
        return Memory::kHaloAt + by_rows(pixel, 2 * slice + matrix_chunk_a(of));
      });
    }
    load_fragments_b<Tile, kBytes, false>(b, thread, s, weight, slice);
  }

  template <class Block>
  BAP_DEVICE static void write_table(Block& b, const HaloParams& p, const Plan& plan, int thread) {
    for (int row = thread; row < Tile::kRows; row += kThreads) {
      const int h = plan.first_h + (row >> plan.shape.tile_w_log), w = plan.first_w + (row & (plan.shape.tile_w - 1));
      Rows::write_row(b, p.conv, thread, row, h < plan.h.output && w < plan.w.output, plan.image, h, w);
    }
  }

  template <class Block>
  BAP_DEVICE static void run(Block& b, const HaloParams& p) {
    const Plan plan = make_plan(p, b.block_x(), b.block_y());
    sum_products<HaloConv2d>(b, p, plan);
    b.sync();
    b.each([&](int thread, State& s) {
      if (p.planar_result) {
        Planes::stage_sums(b, thread, s);
      } else {
        Rows::stage_sums(b, thread, s);
      }
      write_table(b, p, plan, thread);
      if (p.conv.copy != nullptr) Rows::clear_places(b, thread);
    });
    b.sync();
    if (p.conv.copy != nullptr) {
      b.each([&](int thread, State&) { Rows::find_places(b, p.conv, plan.first_column, thread); });
      b.sync();
    }
    b.each([&](int thread, State&) {
      if (p.planar_result) {
        Planes::store(b, p.conv, plan.first_column, thread);
      } else {
        Rows::store(b, p.conv, plan.first_column, thread);
      }
    });
  }
};

}  // namespace bap_kernels
