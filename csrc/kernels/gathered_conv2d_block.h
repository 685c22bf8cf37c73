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

#include "kernels/block_parts.h"

namespace bap_kernels {

template <Products kProducts_, class Tile_, bool kPlanes_>
struct GatheredConv2d {
  using Tile = Tile_;
  using scalar_t = typename ProductTraits<kProducts_>::scalar_t;
  static constexpr Products kProducts = kProducts_;
  static constexpr bool kPlanes = kPlanes_;
  static constexpr int kBytes = sizeof(scalar_t);
  static constexpr int kVector = kChunkBytes / kBytes;
  static constexpr int kDepth = kDepthBytes / kBytes;
  static constexpr int kThreads = Tile::kThreads, kStages = Tile::kStages;
  static constexpr int kRowStep = kThreads / kDepthChunks;
  static constexpr int kCopiesA = Tile::kRows / kRowStep, kCopiesB = Tile::kColumns / kRowStep;
  static constexpr int kGroup = 8;

  // What a thread keeps.
  struct State {
    int64_t source[kPlanes ? 1 : kCopiesA];  // offset of each row's pixel at the first tap; of the image's planes
    int row_h[kPlanes ? 1 : kCopiesA], row_w[kPlanes ? 1 : kCopiesA];
    int channel, next_channel;
    StepCursor cursor;
    float sums[Tile::kProductsM][Tile::kProductsN][4];
    uint32_t a[Tile::kProductsM][4], b[Tile::kProductsN][2];
  };

  // What a block knows.
  struct Plan {
    AxisPlan h, w;
    TilePlace place;
    int rows, first_row, first_column, image, depth, steps;
  };

  BAP_HOST_DEVICE static int row_tiles(const ConvParams& p) {
    const int rows_h = p.gradient ? ceil_div(p.axis_h.input, p.axis_h.stride) : p.axis_h.output;
    const int rows_w = p.gradient ? ceil_div(p.axis_w.input, p.axis_w.stride) : p.axis_w.output;
    return ceil_div(rows_h * rows_w * (kPlanes ? 1 : p.batch), Tile::kRows);
  }
  BAP_HOST_DEVICE static int column_tiles(const ConvParams& p) { return ceil_div(p.columns, Tile::kColumns); }
  BAP_HOST_DEVICE static int grid_x(const ConvParams& p) { return row_tiles(p) * column_tiles(p); }
  BAP_HOST_DEVICE static int grid_y(const ConvParams& p) {
    return kPlanes ? p.batch : p.gradient ? p.axis_h.stride * p.axis_w.stride : 1;
  }

  BAP_DEVICE static Plan make_plan(const ConvParams& p, int block_x, int block_y) {
    Plan plan;
    const int phase = kPlanes ? 0 : block_y;
    plan.h = p.gradient ? gradient_axis(p.axis_h, phase / p.phases_w) : forward_axis(p.axis_h);
    plan.w = p.gradient ? gradient_axis(p.axis_w, phase % p.phases_w) : forward_axis(p.axis_w);
    plan.place = tile_place(block_x, row_tiles(p), column_tiles(p), kGroup);
    plan.rows = plan.h.count * plan.w.count * (kPlanes ? 1 : p.batch);
    plan.first_row = plan.place.row * Tile::kRows;
    plan.first_column = plan.place.column * Tile::kColumns;
    plan.image = kPlanes ? block_y : 0;
    plan.depth = p.depth != nullptr ? *p.depth : p.depth_length;
    plan.steps = ceil_div(plan.depth, kDepth) * plan.h.taps * plan.w.taps;
    return plan;
  }

  // The channel that a thread copies in a block of channels; any that is there where it copies none.
  BAP_DEVICE static int look_up(const ConvParams& p, const Plan& plan, int thread, int block) {
    const int within_block = kPlanes ? copy_depth<kThreads, kBytes>(thread) : copy_chunk(thread) * kVector;
    const int k = block * kDepth + within_block;
    return k < plan.depth ? listed_channel(p.source_list.entries, p.source_list.block, k) : 0;
  }

  BAP_DEVICE static void begin(const ConvParams& p, const Plan& plan, int thread, State& s) {
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
          s.source[i] = at.image * p.source_stride.n + s.row_h[i] * p.source_stride.h + s.row_w[i] * p.source_stride.w;
        }
      }
    }
    s.cursor = {0, 0, 0};
    s.channel = look_up(p, plan, thread, 0);
    s.next_channel = look_up(p, plan, thread, 1);
    BAP_UNROLL
    for (int i = 0; i < Tile::kProductsM; ++i) {
      BAP_UNROLL
      for (int j = 0; j < Tile::kProductsN; ++j) {
        BAP_UNROLL
        for (int r = 0; r < 4; ++r) s.sums[i][j][r] = 0.0f;
      }
    }
  }

  // Starts the thread's copies of the step at its cursor into a stage, and moves the cursor on.
  template <class Block>
  BAP_DEVICE static void copy(Block& b, const ConvParams& p, const Plan& plan, int thread, State& s, int stage) {
    const scalar_t* source = static_cast<const scalar_t*>(p.source);
    const scalar_t* weight = static_cast<const scalar_t*>(p.weight);
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
    const int64_t move = tap * p.stride_weight_tap + k + chunk * kVector;
    BAP_UNROLL
    for (int i = 0; i < kCopiesB; ++i) {
      const int row = copy_row<kThreads>(thread, i);
      const int column = plan.first_column + row;
      const int bytes = column < p.columns ? there : 0;
      b.copy_chunk(thread, stage + Tile::kColumnsAt + by_rows(row, chunk),
                   bytes > 0 ? weight + column * p.stride_weight_column + move : weight, bytes);
    }
    if (advance(s.cursor, plan.h.taps, plan.w.taps)) {
      s.channel = s.next_channel;
      s.next_channel = look_up(p, plan, thread, s.cursor.block + 1);
    }
  }

  // Float offset of an element of the staged result.
  BAP_HOST_DEVICE static constexpr int staged(int row, int column) {
    return kPlanes ? column * (Tile::kRows + Tile::kColumnGap) + row : row * (Tile::kColumns + Tile::kRowGap) + column;
  }

  // Offsets of a row in result, residual and input; -1 for rows beyond the last.
  template <class Block>
  BAP_DEVICE static void write_table(Block& b, const ConvParams& p, const Plan& plan, int thread) {
    for (int row = thread; row < Tile::kRows; row += kThreads) {
      const int m = plan.first_row + row;
      int64_t offsets[3] = {-1, 0, 0};
      if (m < plan.rows) {
        const RowPlace at = row_place(m, plan.h.count, plan.w.count);
        const int n = kPlanes ? plan.image : at.image;
        const int h = at.row * plan.h.result_step + plan.h.result_first;
        const int w = at.column * plan.w.result_step + plan.w.result_first;
        offsets[0] = n * p.result_stride.n + h * p.result_stride.h + w * p.result_stride.w;
        offsets[1] = n * p.residual_stride.n + h * p.residual_stride.h + w * p.residual_stride.w;
        offsets[2] = n * p.input_stride.n + h * p.input_stride.h + w * p.input_stride.w;
      }
      BAP_UNROLL
      for (int i = 0; i < 3; ++i) b.template store<int64_t>(thread, Tile::kTableAt + (3 * row + i) * 8, offsets[i]);
    }
  }

  template <class Block>
  BAP_DEVICE static void stage_sums(Block& b, int thread, const State& s) {
    const int lane = thread % kWarp, warp = thread / kWarp;
    BAP_UNROLL
    for (int i = 0; i < Tile::kProductsM; ++i) {
      BAP_UNROLL
      for (int j = 0; j < Tile::kProductsN; ++j) {
        BAP_UNROLL
        for (int r = 0; r < 4; ++r) {
          const int row = warp / Tile::kWarpsN * Tile::kWarpRows + i * kProductRows + fragment_row_c(lane, r);
          const int column =
              warp % Tile::kWarpsN * Tile::kWarpColumns + j * kProductColumns + fragment_column_c(lane, r);
          b.template store<float>(thread, staged(row, column) * 4, s.sums[i][j][r]);
        }
      }
    }
  }

  // Columns beyond the last one that is stored.
  BAP_DEVICE static int stored_columns(const ConvParams& p) { return p.stored != nullptr ? *p.stored : p.columns; }

  // One column a thread, row after row.
  template <class Block>
  BAP_DEVICE static void reduce(Block& b, const ConvParams& p, const Plan& plan, int thread, int phase) {
    const int limit = p.reduce_off ? p.columns : stored_columns(p);
    const scalar_t* input = static_cast<const scalar_t*>(p.input);
    for (int column = thread; column < Tile::kColumns; column += kThreads) {
      const int j = plan.first_column + column;
      if (j >= p.columns) continue;
      float sum = 0.0f;
      if (j < limit) {
        const int64_t channel = listed_channel(p.result_list.entries, p.result_list.block, j) * p.input_stride.c;
        for (int row = 0; row < Tile::kRows; ++row) {
          if (b.template load<int64_t>(thread, Tile::kTableAt + 3 * row * 8) < 0) continue;
          const int64_t at = b.template load<int64_t>(thread, Tile::kTableAt + (3 * row + 2) * 8) + channel;
          sum += b.template load<float>(thread, staged(row, column) * 4) * to_float(input[at]);
        }
      }
      p.partial[(static_cast<int64_t>(phase) * row_tiles(p) + plan.place.row) * p.columns + j] = sum;
    }
  }

  // The transform of kVector sums that lie at `at` of the residual, and their places in the result.
  struct Column {
    float bias, scale, shift;
    int64_t result;
  };
  BAP_DEVICE static Column column_of(const ConvParams& p, int j, int limit) {
    Column c{0.0f, 1.0f, 0.0f, 0};
    if (j >= limit) return c;
    const bool by_channel = p.full_width || p.bias.values != nullptr;
    const int channel = by_channel ? listed_channel(p.result_list.entries, p.result_list.block, j) : j;
    if (p.bias.values != nullptr) c.bias = vector_value<scalar_t>(p.bias, channel);
    if (p.scale.values != nullptr) c.scale = vector_value<scalar_t>(p.scale, j);
    if (p.shift.values != nullptr) c.shift = vector_value<scalar_t>(p.shift, j);
    c.result = (p.full_width ? channel : j) * p.result_stride.c;
    return c;
  }
  BAP_DEVICE static scalar_t finished(const ConvParams& p, float sum, const Column& c, float residual) {
    const float value = (sum + c.bias) * c.scale + c.shift + residual;
    return from_float<scalar_t>(p.relu ? rectified(value) : value);
  }

  // NHWC: a thread keeps its kVector columns and goes through rows.
  template <class Block>
  BAP_DEVICE static void store_rows(Block& b, const ConvParams& p, const Plan& plan, int thread) {
    constexpr int kLine = Tile::kColumns / kVector;
    static_assert(kThreads % kLine == 0, "a thread keeps its columns");
    const int limit = stored_columns(p);
    const int first = thread % kLine * kVector;
    const int j = plan.first_column + first;
    if (j >= limit) return;
    scalar_t* result = static_cast<scalar_t*>(p.result);
    const scalar_t* residual = static_cast<const scalar_t*>(p.residual);
    Column columns[kVector];
    BAP_UNROLL
    for (int v = 0; v < kVector; ++v) columns[v] = column_of(p, j + v, limit);
    const bool whole = j + kVector <= limit;
    for (int row = thread / kLine; row < Tile::kRows; row += kThreads / kLine) {
      const int64_t to = b.template load<int64_t>(thread, Tile::kTableAt + 3 * row * 8);
      if (to < 0) continue;
      const int64_t from =
          b.template load<int64_t>(thread, Tile::kTableAt + (3 * row + 1) * 8) + j * p.residual_stride.c;
      Chunk<scalar_t> others;
      const bool wide = whole && p.residual_vector;
      if (residual != nullptr && wide) {
        load_chunk(others, residual + from);
      }
      Chunk<scalar_t> chunk;
      BAP_UNROLL
      for (int v = 0; v < kVector; ++v) {
        float other = 0.0f;
        if (residual != nullptr && j + v < limit) {
          other = to_float(wide ? others.values[v] : residual[from + v * p.residual_stride.c]);
        }
        chunk.values[v] = finished(p, b.template load<float>(thread, staged(row, first + v) * 4), columns[v], other);
      }
      if (whole && p.result_vector) {
        store_chunk(result + to + columns[0].result, chunk);
      } else {
        BAP_UNROLL
        for (int v = 0; v < kVector; ++v) {
          if (j + v < limit) result[to + columns[v].result] = chunk.values[v];
        }
      }
    }
  }

  // Planes: a thread stores kVector pixels of a column at a time.
  template <class Block>
  BAP_DEVICE static void store_planes(Block& b, const ConvParams& p, const Plan& plan, int thread) {
    constexpr int kLine = Tile::kRows / kVector;
    const int limit = stored_columns(p);
    scalar_t* result = static_cast<scalar_t*>(p.result);
    const scalar_t* residual = static_cast<const scalar_t*>(p.residual);
    for (int item = thread; item < kLine * Tile::kColumns; item += kThreads) {
      const int column = item / kLine, first = item % kLine * kVector;
      const int j = plan.first_column + column;
      if (j >= limit || plan.first_row + first >= plan.rows) continue;
      const Column c = column_of(p, j, limit);
      const bool whole = plan.first_row + first + kVector <= plan.rows;
      Chunk<scalar_t> chunk;
      int64_t to[kVector];
      BAP_UNROLL
      for (int v = 0; v < kVector; ++v) {
        const int row = first + v;
        to[v] = b.template load<int64_t>(thread, Tile::kTableAt + 3 * row * 8);
        float other = 0.0f;
        if (residual != nullptr && to[v] >= 0) {
          const int64_t from = b.template load<int64_t>(thread, Tile::kTableAt + (3 * row + 1) * 8);
          other = to_float(residual[from + j * p.residual_stride.c]);
        }
        chunk.values[v] = finished(p, b.template load<float>(thread, staged(row, column) * 4), c, other);
      }
      if (whole && p.result_vector) {
        store_chunk(result + to[0] + c.result, chunk);
      } else {
        BAP_UNROLL
        for (int v = 0; v < kVector; ++v) {
          if (to[v] >= 0) result[to[v] + c.result] = chunk.values[v];
        }
      }
    }
  }

  template <class Block>
  BAP_DEVICE static void run(Block& b, const ConvParams& p) {
    const Plan plan = make_plan(p, b.block_x(), b.block_y());
    if (plan.first_column >= stored_columns(p) && !p.reduce_off) return;
    b.each([&](int thread, State& s) {
      begin(p, plan, thread, s);
      for (int stage = 0; stage < kStages - 1; ++stage) {
        if (stage < plan.steps) copy(b, p, plan, thread, s, stage * Tile::kStageBytes);
        b.commit(thread);
      }
    });
    int read = 0, written = kStages - 1;
    for (int step = 0; step < plan.steps; ++step) {
      b.each([&](int thread, State&) { b.template wait<kStages - 2>(thread); });
      // What was read in the step before may be overwritten after it, too.
      b.sync();
      b.each([&](int thread, State& s) {
        if (step + kStages - 1 < plan.steps) copy(b, p, plan, thread, s, written * Tile::kStageBytes);
        b.commit(thread);
      });
      BAP_UNROLL
      for (int slice = 0; slice < kSlices; ++slice) {
        b.each([&](int thread, State& s) {
          load_fragments_a<Tile, kBytes, kPlanes>(b, thread, s, read * Tile::kStageBytes, slice);
          load_fragments_b<Tile, kBytes, false>(b, thread, s, read * Tile::kStageBytes, slice);
        });
        b.template multiply<kProducts, Tile>();
      }
      read = read + 1 == kStages ? 0 : read + 1;
      written = written + 1 == kStages ? 0 : written + 1;
    }
    b.each([&](int thread, State&) { b.template wait<0>(thread); });
    b.sync();
    b.each([&](int thread, State& s) {
      stage_sums(b, thread, s);
      write_table(b, p, plan, thread);
    });
    b.sync();
    b.each([&](int thread, State&) {
      if (p.partial != nullptr) reduce(b, p, plan, thread, b.block_y());
      if (p.result == nullptr) return;
      if constexpr (kPlanes) {
        store_planes(b, p, plan, thread);
      } else {
        store_rows(b, p, plan, thread);
      }
    });
  }
};

}  // namespace bap_kernels
