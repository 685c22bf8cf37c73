// What every convolution does with its sums: they are staged in shared memory, transformed and stored, or reduced.
//   result[m, j] = relu?(scale[j] * (sum[m, j] + bias[o]) + shift[j] + residual[m, j])  with o = result_list[j]
//   copy[m, i] = result[m, copy_list[i]]
//
// kPlanes false: channels of the result lie side by side; a thread keeps its columns and goes through rows.
// kPlanes true:  pixels do; a thread takes several pixels of one column at a time.
// Rows are known by a table in shared memory: offsets of each in result, residual, input and copy, -1 where there is
// none. A copy takes what is stored, to the bit: of each column of the tile its place in the copy is looked for once,
// in the whole list of the copy, so that any order will do.
// A barrier stands between staging and storing. Where there is a copy, places are
// cleared before that barrier and found behind it, with one more before storing.
#pragma once

#include "backends/cuda/kernels/fragments.cuh"

namespace bap_kernels {

// Where the columns that are stored end.
__device__ __forceinline__ int stored_columns(const ConvParams& p) {
  return p.stored != nullptr ? *p.stored : p.columns;
}

template <typename scalar_t, class Tile, bool kPlanes>
struct Epilogue {
  static constexpr int kVector = kChunkBytes / sizeof(scalar_t);
  static constexpr int kThreads = Tile::kThreads;

  __device__ __forceinline__ static float& staged(int row, int column) {
    return shared<float>(Tile::staged(kPlanes, row, column) * 4);
  }

  // A row of the table: the row's pixel (n, h, w) of the result, if it has one.
  __device__ __forceinline__ static void write_row(const ConvParams& p, int row, bool there, int n, int h, int w) {
    const int64_t offsets[Tile::kRowOffsets] = {
        there ? n * p.result_stride.n + h * p.result_stride.h + w * p.result_stride.w : -1,
        n * p.residual_stride.n + h * p.residual_stride.h + w * p.residual_stride.w,
        n * p.input_stride.n + h * p.input_stride.h + w * p.input_stride.w,
        n * p.copy_stride.n + h * p.copy_stride.h + w * p.copy_stride.w,
    };
#pragma unroll
    for (int i = 0; i < Tile::kRowOffsets; ++i) shared<int64_t>(offset_at(row, i)) = offsets[i];
  }

  __device__ __forceinline__ static void clear_places() {
    for (int column = threadIdx.x; column < Tile::kColumns; column += kThreads) {
      shared<int>(place_at(column)) = kNowhere;
    }
  }
  __device__ __forceinline__ static void find_places(const ConvParams& p, int first_column) {
    for (int i = threadIdx.x; i < p.copied; i += kThreads) {
      const int column = p.copy_list[i] - first_column;
      if (within(column, Tile::kColumns)) shared<int>(place_at(column)) = i;
    }
  }

  __device__ __forceinline__ static void stage_sums(const Sums<Tile>& sums) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int i = 0; i < Tile::kMmasM; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kMmasN; ++j) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int row = warp / Tile::kWarpsN * Tile::kWarpRows + i * kMmaRows + fragment_row_c(lane, r);
          const int column = warp % Tile::kWarpsN * Tile::kWarpColumns + j * kMmaColumns + fragment_column_c(lane, r);
          staged(row, column) = sums[i][j][r];
        }
      }
    }
  }

  // One column a thread, row after row, into row `term` of the terms.
  __device__ __forceinline__ static void reduce(const ConvParams& p, int first_column, int64_t term) {
    const int limit = p.reduce_off ? p.columns : stored_columns(p);
    const scalar_t* input = static_cast<const scalar_t*>(p.input);
    for (int column = threadIdx.x; column < Tile::kColumns; column += kThreads) {
      const int j = first_column + column;
      if (j >= p.columns) continue;
      float sum = 0.0f;
      if (j < limit) {
        const int64_t channel = listed_channel(p.result_list, j) * p.input_stride.c;
        for (int row = 0; row < Tile::kRows; ++row) {
          if (shared<int64_t>(offset_at(row, kResultOffset)) < 0) continue;
          const int64_t at = shared<int64_t>(offset_at(row, kInputOffset)) + channel;
          sum += staged(row, column) * to_float(input[at]);
        }
      }
      p.partial[term * p.columns + j] = sum;
    }
  }

  // Stores the columns from `first_column` on.
  __device__ __forceinline__ static void store(const ConvParams& p, int first_column) {
    if constexpr (kPlanes) {
      store_planes(p, first_column);
    } else {
      store_rows(p, first_column);
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
  __device__ __forceinline__ static Column column_of(const ConvParams& p, int j, int limit) {
    Column c{0.0f, 1.0f, 0.0f, 0};
    if (j >= limit) return c;
    const bool by_channel = p.full_width || p.bias.values != nullptr;
    const int channel = by_channel ? listed_channel(p.result_list, j) : j;
    if (p.bias.values != nullptr) c.bias = vector_value<scalar_t>(p.bias, channel);
    if (p.scale.values != nullptr) c.scale = vector_value<scalar_t>(p.scale, j);
    if (p.shift.values != nullptr) c.shift = vector_value<scalar_t>(p.shift, j);
    c.result = (p.full_width ? channel : j) * p.result_stride.c;
    return c;
  }
  // What results are at least; NaN stays NaN.
  __device__ __forceinline__ static float least(const ConvParams& p) {
    return p.relu ? 0.0f : -__int_as_float(0x7f800000);
  }
  __device__ __forceinline__ static scalar_t finished(float least, float sum, const Column& c, float residual) {
    const float value = (sum + c.bias) * c.scale + c.shift + residual;
    return from_float<scalar_t>(value < least ? least : value);
  }

  __device__ __forceinline__ static void store_rows(const ConvParams& p, int first_column) {
    constexpr int kLine = Tile::kColumns / kVector;
    static_assert(kThreads % kLine == 0, "a thread keeps its columns");
    const int limit = stored_columns(p);
    const int first = threadIdx.x % kLine * kVector;
    const int j = first_column + first;
    if (j >= limit) return;
    scalar_t* result = static_cast<scalar_t*>(p.result);
    const scalar_t* residual = static_cast<const scalar_t*>(p.residual);
    Column columns[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) columns[v] = column_of(p, j + v, limit);
    const bool whole = j + kVector <= limit;
    int places[kVector];
    bool copied = false, copied_whole = p.copy_vector && whole;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      places[v] = p.copy != nullptr && j + v < limit ? shared<int>(place_at(first + v)) : kNowhere;
      copied |= places[v] != kNowhere;
      copied_whole &= places[v] == places[0] + v;
    }
    copied_whole &= places[0] % kVector == 0;
    const float low = least(p);
    for (int row = threadIdx.x / kLine; row < Tile::kRows; row += kThreads / kLine) {
      const int64_t to = shared<int64_t>(offset_at(row, kResultOffset));
      if (to < 0) continue;
      const int64_t from = shared<int64_t>(offset_at(row, kResidualOffset)) + j * p.residual_stride.c;
      // The kinds of residuals are told apart once for all elements.
      float others[kVector] = {};
      if (residual != nullptr && whole && p.residual_vector) {
        Chunk<scalar_t> loaded;
        load_chunk(loaded, residual + from);
#pragma unroll
        for (int v = 0; v < kVector; ++v) others[v] = to_float(loaded.values[v]);
      } else if (residual != nullptr) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          if (j + v < limit) others[v] = to_float(residual[from + v * p.residual_stride.c]);
        }
      }
      Chunk<scalar_t> chunk;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        chunk.values[v] = finished(low, staged(row, first + v), columns[v], others[v]);
      }
      if (whole && p.result_vector) {
        store_chunk(result + to + columns[0].result, chunk);
      } else {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          if (j + v < limit) result[to + columns[v].result] = chunk.values[v];
        }
      }
      if (!copied) continue;
      scalar_t* copy = static_cast<scalar_t*>(p.copy) + shared<int64_t>(offset_at(row, kCopyOffset));
      if (copied_whole) {
        store_chunk(copy + places[0], chunk);
      } else {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          if (places[v] != kNowhere) copy[places[v] * p.copy_stride.c] = chunk.values[v];
        }
      }
    }
  }

  __device__ __forceinline__ static void store_planes(const ConvParams& p, int first_column) {
    constexpr int kLine = Tile::kRows / kVector;
    const int limit = stored_columns(p);
    scalar_t* result = static_cast<scalar_t*>(p.result);
    const scalar_t* residual = static_cast<const scalar_t*>(p.residual);
    const float low = least(p);
    for (int item = threadIdx.x; item < kLine * Tile::kColumns; item += kThreads) {
      const int column = item / kLine, first = item % kLine * kVector;
      const int j = first_column + column;
      if (j >= limit || shared<int64_t>(offset_at(first, kResultOffset)) < 0) continue;
      const Column c = column_of(p, j, limit);
      Chunk<scalar_t> chunk;
      int64_t to[kVector];
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        to[v] = shared<int64_t>(offset_at(first + v, kResultOffset));
      }
      float others[kVector] = {};
      if (residual != nullptr) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const int64_t from = shared<int64_t>(offset_at(first + v, kResidualOffset));
          if (to[v] >= 0) others[v] = to_float(residual[from + j * p.residual_stride.c]);
        }
      }
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        chunk.values[v] = finished(low, staged(first + v, column), c, others[v]);
      }
      const bool together = to[kVector - 1] == to[0] + kVector - 1;
      if (together && p.result_vector && (to[0] + c.result) % kVector == 0) {
        store_chunk(result + to[0] + c.result, chunk);
      } else {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          if (to[v] >= 0) result[to[v] + c.result] = chunk.values[v];
        }
      }
      const int place = p.copy != nullptr ? shared<int>(place_at(column)) : kNowhere;
      if (place == kNowhere) continue;
      scalar_t* copy = static_cast<scalar_t*>(p.copy) + place * p.copy_stride.c;
      const int64_t start = shared<int64_t>(offset_at(first, kCopyOffset));
      // Pixels that lie side by side in the result do so in the copy.
      if (together && p.copy_vector && (start + place * p.copy_stride.c) % kVector == 0) {
        store_chunk(copy + start, chunk);
      } else {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          if (to[v] < 0) continue;
          copy[shared<int64_t>(offset_at(first + v, kCopyOffset))] = chunk.values[v];
        }
      }
    }
  }
};

}  // namespace bap_kernels
