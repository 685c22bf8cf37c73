// Parts that the blocks of several kernels share: fragments of a slice, list look-ups, epilogue values.
#pragma once

#include "backends/cuda/kernels/conv_params.h"
#include "backends/cuda/kernels/elements.h"
#include "backends/cuda/kernels/tile_layout.h"

namespace bap_kernels {

// 16 bytes of elements in registers, loaded from and stored to aligned memory at once.
template <typename scalar_t>
struct alignas(kChunkBytes) Chunk {
  static constexpr int kCount = kChunkBytes / sizeof(scalar_t);
  scalar_t values[kCount];
};
template <typename scalar_t>
BAP_DEVICE void load_chunk(Chunk<scalar_t>& chunk, const scalar_t* from) {
#if defined(__CUDACC__)
  reinterpret_cast<uint4&>(chunk) = *reinterpret_cast<const uint4*>(from);
#else
  std::memcpy(&chunk, __builtin_assume_aligned(from, kChunkBytes), kChunkBytes);
#endif
}
template <typename scalar_t>
BAP_DEVICE void store_chunk(scalar_t* to, const Chunk<scalar_t>& chunk) {
#if defined(__CUDACC__)
  *reinterpret_cast<uint4*>(to) = reinterpret_cast<const uint4&>(chunk);
#else
  std::memcpy(__builtin_assume_aligned(to, kChunkBytes), &chunk, kChunkBytes);
#endif
}

template <typename scalar_t>
BAP_HOST_DEVICE float vector_value(const VectorParams& v, int i) {
  return v.is_float ? static_cast<const float*>(v.values)[i] : to_float(static_cast<const scalar_t*>(v.values)[i]);
}

// NaN stays NaN, as in torch.
BAP_HOST_DEVICE float rectified(float value) { return value < 0.0f ? 0.0f : value; }

// relu?(scale[i] * from + shift[i]), rounded.
template <typename scalar_t>
BAP_DEVICE scalar_t transformed(const VectorParams& scale, const VectorParams& shift, bool relu, scalar_t from, int i) {
  float value = to_float(from);
  if (scale.values != nullptr) value *= vector_value<scalar_t>(scale, i);
  if (shift.values != nullptr) value += vector_value<scalar_t>(shift, i);
  return from_float<scalar_t>(relu ? rectified(value) : value);
}

// Fragments of slice `slice` of an operand that starts at byte `at`: kMmasM x 4 and kMmasN x 2 registers.
template <class Tile, int kElementBytes, bool kByDepth, class Block, class State>
BAP_DEVICE void load_fragments_a(Block& b, int thread, State& s, int at, int slice) {
  const int lane = thread % kWarp;
  const int first = thread / kWarp / Tile::kWarpsN * Tile::kWarpRows;
  BAP_UNROLL
  for (int i = 0; i < Tile::kMmasM; ++i) {
    const int row = first + i * kMmaRows;
    if constexpr (!kByDepth) {
      b.load_matrices(thread, s.a[i],
                      [=](int of) { return at + by_rows(row + matrix_row_a(of), 2 * slice + matrix_chunk_a(of)); });
    } else if constexpr (kElementBytes == 2) {
      b.load_matrices_transposed(thread, s.a[i], [=](int of) {
        return at + by_depth<Tile::kRows, 2>(16 * slice + transposed_depth_a(of), row / 8 + transposed_chunk_a(of));
      });
    } else {
      BAP_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int m = row + fragment_row_a(lane, r);
        s.a[i][r] = b.load_word(
            thread, at + by_depth<Tile::kRows, 4>(8 * slice + fragment_depth_a(lane, r), m / 4) + m % 4 * 4);
      }
    }
  }
}

template <class Tile, int kElementBytes, bool kByDepth, class Block, class State>
BAP_DEVICE void load_fragments_b(Block& b, int thread, State& s, int at, int slice) {
  const int lane = thread % kWarp;
  const int first = thread / kWarp % Tile::kWarpsN * Tile::kWarpColumns;
  BAP_UNROLL
  for (int j = 0; j < Tile::kMmasN; j += 2) {
    const int column = first + j * kMmaColumns;
    uint32_t pair[4];
    if constexpr (!kByDepth) {
      b.load_matrices(thread, pair,
                      [=](int of) { return at + by_rows(column + matrix_row_b(of), 2 * slice + matrix_chunk_b(of)); });
    } else if constexpr (kElementBytes == 2) {
      b.load_matrices_transposed(thread, pair, [=](int of) {
        return at +
               by_depth<Tile::kColumns, 2>(16 * slice + transposed_depth_b(of), column / 8 + transposed_chunk_b(of));
      });
    } else {
      BAP_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int n = column + r / 2 * kMmaColumns + fragment_column_b(lane);
        pair[r] = b.load_word(
            thread, at + by_depth<Tile::kColumns, 4>(8 * slice + fragment_depth_b(lane, r % 2), n / 4) + n % 4 * 4);
      }
    }
    s.b[j][0] = pair[0], s.b[j][1] = pair[1];
    s.b[j + 1][0] = pair[2], s.b[j + 1][1] = pair[3];
  }
}

}  // namespace bap_kernels
