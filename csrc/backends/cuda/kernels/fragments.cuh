// A warp's part of a tile: fragments of one slice of depth, from shared memory to registers, and their products.
#pragma once

#include "backends/cuda/kernels/instructions.cuh"

namespace bap_kernels {

template <class Tile>
using Sums = float[Tile::kMmasM][Tile::kMmasN][4];
template <class Tile>
using FragmentsA = uint32_t[Tile::kMmasM][4];
template <class Tile>
using FragmentsB = uint32_t[Tile::kMmasN][2];

// The first row and the first column of the tile that the thread's warp multiplies.
template <class Tile>
__device__ __forceinline__ int warp_row() {
  return static_cast<int>(threadIdx.x) / kWarp / Tile::kWarpsN * Tile::kWarpRows;
}
template <class Tile>
__device__ __forceinline__ int warp_column() {
  return static_cast<int>(threadIdx.x) / kWarp % Tile::kWarpsN * Tile::kWarpColumns;
}

// The fragments of rows of slice `slice`, of an operand that starts at byte `at` and lies by rows or by depth.
template <class Tile, int kElementBytes, bool kByDepth>
__device__ __forceinline__ void load_a(FragmentsA<Tile>& a, int at, int slice) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < Tile::kMmasM; ++i) {
    const int row = warp_row<Tile>() + i * kMmaRows;
    if constexpr (!kByDepth) {
      load_matrices(a[i], at + by_rows(row + matrix_row_a(lane), 2 * slice + matrix_chunk_a(lane)));
    } else if constexpr (kElementBytes == 2) {
      load_matrices_transposed(a[i], at + by_depth<Tile::kRows, 2>(16 * slice + transposed_depth_a(lane),
                                                                   row / 8 + transposed_chunk_a(lane)));
    } else {
      // Matrix loads do not transpose words of 4 bytes.
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int m = row + fragment_row_a(lane, r);
        a[i][r] =
            shared<uint32_t>(at + by_depth<Tile::kRows, 4>(8 * slice + fragment_depth_a(lane, r), m / 4) + m % 4 * 4);
      }
    }
  }
}

// The same of columns.
template <class Tile, int kElementBytes, bool kByDepth>
__device__ __forceinline__ void load_b(FragmentsB<Tile>& b, int at, int slice) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < Tile::kMmasN; j += 2) {
    const int column = warp_column<Tile>() + j * kMmaColumns;
    uint32_t pair[4];
    if constexpr (!kByDepth) {
      load_matrices(pair, at + by_rows(column + matrix_row_b(lane), 2 * slice + matrix_chunk_b(lane)));
    } else if constexpr (kElementBytes == 2) {
      load_matrices_transposed(pair, at + by_depth<Tile::kColumns, 2>(16 * slice + transposed_depth_b(lane),
                                                                      column / 8 + transposed_chunk_b(lane)));
    } else {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int n = column + r / 2 * kMmaColumns + fragment_column_b(lane);
        pair[r] = shared<uint32_t>(at + by_depth<Tile::kColumns, 4>(8 * slice + fragment_depth_b(lane, r % 2), n / 4) +
                                   n % 4 * 4);
      }
    }
    b[j][0] = pair[0], b[j][1] = pair[1];
    b[j + 1][0] = pair[2], b[j + 1][1] = pair[3];
  }
}

// Stores the sums of a tile's first rows and columns at `to`, where a row lies `stride_row` behind the one before.
template <class Tile>
__device__ __forceinline__ void store_sums(const Sums<Tile>& sums, float* to, int64_t stride_row, int rows,
                                           int columns) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < Tile::kMmasM; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = warp_row<Tile>() + i * kMmaRows + fragment_row_c(lane, r);
      if (row >= rows) continue;
#pragma unroll
      for (int j = 0; j < Tile::kMmasN; ++j) {
        const int column = warp_column<Tile>() + j * kMmaColumns + fragment_column_c(lane, r);
        if (column < columns) to[row * stride_row + column] = sums[i][j][r];
      }
    }
  }
}

// All products of the fragments; elements of 4 bytes are rounded to TF32 first.
template <MathMode kMode, class Tile>
__device__ __forceinline__ void multiply(Sums<Tile>& sums, FragmentsA<Tile>& a, FragmentsB<Tile>& b) {
  if constexpr (kMode == MathMode::kTf32) {
#pragma unroll
    for (int i = 0; i < Tile::kMmasM; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) a[i][r] = to_tf32(a[i][r]);
    }
#pragma unroll
    for (int j = 0; j < Tile::kMmasN; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) b[j][r] = to_tf32(b[j][r]);
    }
  }
#pragma unroll
  for (int i = 0; i < Tile::kMmasM; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kMmasN; ++j) mma<kMode>(sums[i][j], a[i], b[j]);
  }
}

}  // namespace bap_kernels
