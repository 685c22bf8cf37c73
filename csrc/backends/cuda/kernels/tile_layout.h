// Where a tile's parts lie: shared memory, the copies of each thread, and the fragments of each lane.
//
// A stage of the pipeline holds kChunkBytes * 8 = 128 bytes of depth for every row of a tile, in one of two layouts:
//   by rows:  [row][depth], 8 chunks of 16 bytes a row                  (channels contiguous)
//   by depth: [depth][row], rows * element bytes / 16 chunks a line     (pixels contiguous)
// A chunk's place within its line is exchanged with that of others (XOR), so that the 8 rows that a matrix load reads,
// or the 4 depths and 8 rows that 32 loads of words read, lie in different banks.
#pragma once

#include "backends/cuda/kernels/host_device.h"

namespace bap_kernels {

constexpr int kChunkBytes = 16;
constexpr int kDepthBytes = 128;
constexpr int kDepthChunks = kDepthBytes / kChunkBytes;
constexpr int kWarp = 32;
// One product of the tensor cores: 16 rows x 8 columns x 32 bytes of depth, whatever the element type.
constexpr int kMmaRows = 16, kMmaColumns = 8, kSliceBytes = 32;
constexpr int kSlices = kDepthBytes / kSliceBytes;

// Rows and columns of the result that a block computes, warps along each, stages of the pipeline.
template <int kRows_, int kColumns_, int kWarpsM_, int kWarpsN_, int kStages_, int kBlocks_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarp;
  static constexpr int kWarpRows = kRows / kWarpsM, kWarpColumns = kColumns / kWarpsN;
  static constexpr int kMmasM = kWarpRows / kMmaRows, kMmasN = kWarpColumns / kMmaColumns;
  static constexpr int kStageBytes = (kRows + kColumns) * kDepthBytes;
  static constexpr int kColumnsAt = kRows * kDepthBytes;  // where a stage's second operand starts
  // A result is staged in float32 before it is stored; the gap at each line's end keeps its writes off each other's
  // banks. Behind it, offsets for each row and a number for each column.
  static constexpr int kRowGap = 8, kColumnGap = 4;
  static constexpr int kStagedBytes =
      (kRows * (kColumns + kRowGap) > kColumns * (kRows + kColumnGap) ? kRows * (kColumns + kRowGap)
                                                                      : kColumns * (kRows + kColumnGap)) *
      4;
  // Float offset of an element of the staged result, by rows or with `by_columns`.
  BAP_HOST_DEVICE static constexpr int staged(bool by_columns, int row, int column) {
    return by_columns ? column * (kRows + kColumnGap) + row : row * (kColumns + kRowGap) + column;
  }
  static constexpr int kRowOffsets = 4;
  static constexpr int kTableAt = kStagedBytes, kPlacesAt = kTableAt + kRows * kRowOffsets * 8;
  static constexpr int kEpilogueBytes = kPlacesAt + kColumns * 4;
  static constexpr int kPipelineBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kPipelineBytes > kEpilogueBytes ? kPipelineBytes : kEpilogueBytes;
  static_assert(kWarpRows % kMmaRows == 0 && kWarpColumns % (2 * kMmaColumns) == 0, "pairs of products");
  static_assert(kThreads % kDepthChunks == 0 && kRows % (kThreads / kDepthChunks) == 0, "whole copies");
  static_assert(kColumns % (kThreads / kDepthChunks) == 0, "whole copies");
};

// Byte offset of a chunk in a tile that lies by rows.
BAP_HOST_DEVICE constexpr int by_rows(int row, int chunk) {
  return row * kDepthBytes + ((chunk ^ (row & 7)) * kChunkBytes);
}

// Byte offset of a chunk of rows at one depth, in a tile of kRows rows that lies by depth.
template <int kRows, int kElementBytes>
BAP_HOST_DEVICE constexpr int by_depth(int depth, int chunk) {
  const int turn = kElementBytes == 2 ? depth & 7 : (depth & 3) * 2;
  return depth * kRows * kElementBytes + ((chunk ^ turn) * kChunkBytes);
}

// Copies by rows: a thread keeps its chunk of the depth and takes rows that are threads / 8 apart.
BAP_HOST_DEVICE constexpr int copy_chunk(int thread) { return thread % kDepthChunks; }
template <int kThreads>
BAP_HOST_DEVICE constexpr int copy_row(int thread, int i) {
  return thread / kDepthChunks + i * (kThreads / kDepthChunks);
}

// Copies by depth: a thread keeps its depth, and with it its one look-up, and takes chunks that are kThreads / depths
// apart.
template <int kThreads, int kElementBytes>
BAP_HOST_DEVICE constexpr int depth_threads() {
  return kThreads * kElementBytes / kDepthBytes;
}
template <int kThreads, int kElementBytes>
BAP_HOST_DEVICE constexpr int copy_depth(int thread) {
  return thread / depth_threads<kThreads, kElementBytes>();
}
template <int kThreads, int kElementBytes>
BAP_HOST_DEVICE constexpr int copy_depth_chunk(int thread, int i) {
  return thread % depth_threads<kThreads, kElementBytes>() + i * depth_threads<kThreads, kElementBytes>();
}

// Which row and chunk of the slice a lane gives the address of, when four 8 x 8 matrices (of 2-byte words; 8 x 4 of
// 4-byte ones) are loaded at once. A: 16 rows x 2 chunks of depth; B: two groups of 8 columns x 2 chunks of depth.
BAP_HOST_DEVICE constexpr int matrix_row_a(int lane) { return lane & 15; }
BAP_HOST_DEVICE constexpr int matrix_chunk_a(int lane) { return lane >> 4; }
BAP_HOST_DEVICE constexpr int matrix_row_b(int lane) { return (lane & 7) + ((lane >> 4) << 3); }
BAP_HOST_DEVICE constexpr int matrix_chunk_b(int lane) { return (lane >> 3) & 1; }

// The same for 2-byte tiles that lie by depth, whose matrices are loaded transposed: the depth within the slice, and
// the group of 8 rows.
BAP_HOST_DEVICE constexpr int transposed_depth_a(int lane) { return (lane & 7) + ((lane >> 4) << 3); }
BAP_HOST_DEVICE constexpr int transposed_chunk_a(int lane) { return (lane >> 3) & 1; }
BAP_HOST_DEVICE constexpr int transposed_depth_b(int lane) { return lane & 15; }
BAP_HOST_DEVICE constexpr int transposed_chunk_b(int lane) { return lane >> 4; }

// Fragments of one product, by lane and register. A register holds one 4-byte element or two 2-byte ones; `depth`
// counts registers' worth of depth, so that it is a 4-byte element's number, or half a 2-byte element's.
BAP_HOST_DEVICE constexpr int fragment_row_a(int lane, int r) { return (lane >> 2) + (r & 1) * 8; }
BAP_HOST_DEVICE constexpr int fragment_depth_a(int lane, int r) { return (lane & 3) + (r >> 1) * 4; }
BAP_HOST_DEVICE constexpr int fragment_column_b(int lane) { return lane >> 2; }
BAP_HOST_DEVICE constexpr int fragment_depth_b(int lane, int r) { return (lane & 3) + r * 4; }
BAP_HOST_DEVICE constexpr int fragment_row_c(int lane, int r) { return (lane >> 2) + (r >> 1) * 8; }
BAP_HOST_DEVICE constexpr int fragment_column_c(int lane, int r) { return (lane & 3) * 2 + (r & 1); }

// Bytes of a 16-byte chunk whose first element is number `first`, that lie before `end`.
template <int kElementBytes>
BAP_HOST_DEVICE constexpr int chunk_bytes(int first, int end) {
  const int left = (end - first) * kElementBytes;
  return left <= 0 ? 0 : left < kChunkBytes ? left : kChunkBytes;
}

// Tiles in order of blocks: kTileGroup row tiles side by side for each column tile, so that neighbours share operands;
// the last row tiles, if they are fewer, one after the other.
constexpr int kTileGroup = 8;
struct TilePlace {
  int row, column;
};
BAP_HOST_DEVICE TilePlace tile_place(int block, int row_tiles, const Divisor& column_tiles) {
  const int line = column_tiles.quotient(block), first = line / kTileGroup * kTileGroup;
  if (row_tiles - first < kTileGroup) return {line, column_tiles.rest(block, line)};
  const int place = column_tiles.rest(block, first);
  return {first + place % kTileGroup, place / kTileGroup};
}

}  // namespace bap_kernels
