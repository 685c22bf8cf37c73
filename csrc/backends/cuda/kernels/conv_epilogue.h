// What every convolution does with its sums: they are staged in shared memory, transformed and stored, or reduced.
//   result[m, j] = relu?(scale[j] * (sum[m, j] + bias[o]) + shift[j] + residual[m, j])  with o = result_list[j]
//   copy[m, i] = result[m, copy_list[i]]
//
// kPlanes false: channels of the result lie side by side; a thread keeps its columns and goes through rows.
// kPlanes true:  pixels do; a thread takes several pixels of one column at a time.
// Rows are known by a table in shared memory: offsets of each in result, residual, input and copy, -1 where there is
// none. A copy takes what is stored, to the bit: of each column of the tile its place in the copy is looked for once,
// in the whole list of the copy, so that any order will do.
// Every function is one thread's part; a barrier stands between staging and storing. Where there is a copy, places are
// cleared before that barrier and found behind it, with one more before storing.
#pragma once

#include "backends/cuda/kernels/block_parts.h"

namespace bap_kernels {

template <typename scalar_t_, class Tile_, bool kPlanes_>
struct ConvEpilogue {
  using scalar_t = scalar_t_;
  using Tile = Tile_;
  static constexpr bool kPlanes = kPlanes_;
  static constexpr int kVector = kChunkBytes / sizeof(scalar_t);
  static constexpr int kThreads = Tile::kThreads;

  // Float offset of an element of the staged result.
  BAP_HOST_DEVICE static constexpr int staged(int row, int column) {
    return kPlanes ? column * (Tile::kRows + Tile::kColumnGap) + row : row * (Tile::kColumns + Tile::kRowGap) + column;
  }

  // A row of the table: the row's pixel (n, h, w) of the result, if it has one.
  template <class Block>
  BAP_DEVICE static void write_row(Block& b, const ConvParams& p, int thread, int row, bool there, int n, int h,
                                   int w) {
    const int64_t offsets[Tile::kRowOffsets] = {
        there ? n * p.result_stride.n + h * p.result_stride.h + w * p.result_stride.w : -1,
        n * p.residual_stride.n + h * p.residual_stride.h + w * p.residual_stride.w,
        n * p.input_stride.n + h * p.input_stride.h + w * p.input_stride.w,
        n * p.copy_stride.n + h * p.copy_stride.h + w * p.copy_stride.w,
    };
    BAP_UNROLL
    for (int i = 0; i < Tile::kRowOffsets; ++i) b.template store<int64_t>(thread, offset_at(row, i), offsets[i]);
  }

  template <class Block>
  BAP_DEVICE static void clear_places(Block& b, int thread) {
    for (int column = thread; column < Tile::kColumns; column += kThreads) {
      b.template store<int>(thread, place_at(column), kNowhere);
    }
  }
  template <class Block>
  BAP_DEVICE static void find_places(Block& b, const ConvParams& p, int first_column, int thread) {
    for (int i = thread; i < p.copied; i += kThreads) {
      const int column = p.copy_list[i] - first_column;
      if (within(column, Tile::kColumns)) b.template store<int>(thread, place_at(column), i);
    }
  }

  template <class Block, class State>
  BAP_DEVICE static void stage_sums(Block& b, int thread, const State& s) {
    const int lane = thread % kWarp, warp = thread / kWarp;
    BAP_UNROLL
    for (int i = 0; i < Tile::kMmasM; ++i) {
      BAP_UNROLL
      for (int j = 0; j < Tile::kMmasN; ++j) {
        BAP_UNROLL
        for (int r = 0; r < 4; ++r) {
          const int row = warp / Tile::kWarpsN * Tile::kWarpRows + i * kMmaRows + fragment_row_c(lane, r);
          const int column = warp % Tile::kWarpsN * Tile::kWarpColumns + j * kMmaColumns + fragment_column_c(lane, r);
          b.template store<float>(thread, staged(row, column) * 4, s.sums[i][j][r]);
        }
      }
    }
  }

  // Columns beyond the last one that is stored.
  BAP_DEVICE static int stored_columns(const ConvParams& p) { return p.stored != nullptr ? *p.stored : p.columns; }

  // One column a thread, row after row, into row `term` of the terms.
  template <class Block>
  BAP_DEVICE static void reduce(Block& b, const ConvParams& p, int first_column, int64_t term, int thread) {
    const int limit = p.reduce_off ? p.columns : stored_columns(p);
    const scalar_t* input = static_cast<const scalar_t*>(p.input);
    for (int column = thread; column < Tile::kColumns; column += kThreads) {
      const int j = first_column + column;
      if (j >= p.columns) continue;
      float sum = 0.0f;
      if (j < limit) {
        const int64_t channel = listed_channel(p.result_list.entries, p.result_list.block, j) * p.input_stride.c;
        for (int row = 0; row < Tile::kRows; ++row) {
          if (b.template load<int64_t>(thread, offset_at(row, kResultOffset)) < 0) continue;
          const int64_t at = b.template load<int64_t>(thread, offset_at(row, kInputOffset)) + channel;
          sum += b.template load<float>(thread, staged(row, column) * 4) * to_float(input[at]);
        }
      }
      p.partial[term * p.columns + j] = sum;
    }
  }

  // Stores the columns from `first_column` on.
  template <class Block>
  BAP_DEVICE static void store(Block& b, const ConvParams& p, int first_column, int thread) {
    if constexpr (kPlanes) {
      store_planes(b, p, first_column, thread);
    } else {
      store_rows(b, p, first_column, thread);
    }
  }

 private:
  enum Offset { kResultOffset, kResidualOffset, kInputOffset, kCopyOffset };
  static constexpr int kNowhere = -1;
  BAP_HOST_DEVICE static constexpr int offset_at(int row, int offset) {
    return Tile::kTableAt + (Tile::kRowOffsets * row + offset) * 8;
  }
  BAP_HOST_DEVICE static constexpr int place_at(int column) { return Tile::kPlacesAt + column * 4; }

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

  template <class Block>
  BAP_DEVICE static void store_rows(Block& b, const ConvParams& p, int first_column, int thread) {
    constexpr int kLine = Tile::kColumns / kVector;
    static_assert(kThreads % kLine == 0, "a thread keeps its columns");
    const int limit = stored_columns(p);
    const int first = thread % kLine * kVector;
    const int j = first_column + first;
    if (j >= limit) return;
    scalar_t* result = static_cast<scalar_t*>(p.result);
    const scalar_t* residual = static_cast<const scalar_t*>(p.residual);
    Column columns[kVector];
    BAP_UNROLL
    for (int v = 0; v < kVector; ++v) columns[v] = column_of(p, j + v, limit);
    const bool whole = j + kVector <= limit;
    int places[kVector];
    bool copied = false, copied_whole = p.copy_vector && whole;
    BAP_UNROLL
    for (int v = 0; v < kVector; ++v) {
      places[v] = p.copy != nullptr && j + v < limit ? b.template load<int>(thread, place_at(first + v)) : kNowhere;
      copied |= places[v] != kNowhere;
      copied_whole &= places[v] == places[0] + v;
    }
    copied_whole &= places[0] % kVector == 0;
    for (int row = thread / kLine; row < Tile::kRows; row += kThreads / kLine) {
      const int64_t to = b.template load<int64_t>(thread, offset_at(row, kResultOffset));
      if (to < 0) continue;
      const int64_t from = b.template load<int64_t>(thread, offset_at(row, kResidualOffset)) + j * p.residual_stride.c;
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
      if (!copied) continue;
      scalar_t* copy = static_cast<scalar_t*>(p.copy) + b.template load<int64_t>(thread, offset_at(row, kCopyOffset));
      if (copied_whole) {
        store_chunk(copy + places[0], chunk);
      } else {
        BAP_UNROLL
        for (int v = 0; v < kVector; ++v) {
          if (places[v] != kNowhere) copy[places[v] * p.copy_stride.c] = chunk.values[v];
        }
      }
    }
  }

  template <class Block>
  BAP_DEVICE static void store_planes(Block& b, const ConvParams& p, int first_column, int thread) {
    constexpr int kLine = Tile::kRows / kVector;
    const int limit = stored_columns(p);
    scalar_t* result = static_cast<scalar_t*>(p.result);
    const scalar_t* residual = static_cast<const scalar_t*>(p.residual);
    for (int item = thread; item < kLine * Tile::kColumns; item += kThreads) {
      const int column = item / kLine, first = item % kLine * kVector;
      const int j = first_column + column;
      if (j >= limit || b.template load<int64_t>(thread, offset_at(first, kResultOffset)) < 0) continue;
      const Column c = column_of(p, j, limit);
      Chunk<scalar_t> chunk;
      int64_t to[kVector];
      BAP_UNROLL
      for (int v = 0; v < kVector; ++v) {
        const int row = first + v;
        to[v] = b.template load<int64_t>(thread, offset_at(row, kResultOffset));
        float other = 0.0f;
        if (residual != nullptr && to[v] >= 0) {
          const int64_t from = b.template load<int64_t>(thread, offset_at(row, kResidualOffset));
          other = to_float(residual[from + j * p.residual_stride.c]);
        }
        chunk.values[v] = finished(p, b.template load<float>(thread, staged(row, column) * 4), c, other);
      }
      const bool together = to[kVector - 1] == to[0] + kVector - 1;
      if (together && p.result_vector && (to[0] + c.result) % kVector == 0) {
        store_chunk(result + to[0] + c.result, chunk);
      } else {
        BAP_UNROLL
        for (int v = 0; v < kVector; ++v) {
          if (to[v] >= 0) result[to[v] + c.result] = chunk.values[v];
        }
      }
      const int place = p.copy != nullptr ? b.template load<int>(thread, place_at(column)) : kNowhere;
      if (place == kNowhere) continue;
      scalar_t* copy = static_cast<scalar_t*>(p.copy) + place * p.copy_stride.c;
      const int64_t start = b.template load<int64_t>(thread, offset_at(first, kCopyOffset));
      // Pixels that lie side by side in the result do so in the copy.
      if (together && p.copy_vector && (start + place * p.copy_stride.c) % kVector == 0) {
        store_chunk(copy + start, chunk);
      } else {
        BAP_UNROLL
        for (int v = 0; v < kVector; ++v) {
          if (to[v] < 0) continue;
          copy[b.template load<int64_t>(thread, offset_at(first + v, kCopyOffset))] = chunk.values[v];
        }
      }
    }
  }
};

}  // namespace bap_kernels
