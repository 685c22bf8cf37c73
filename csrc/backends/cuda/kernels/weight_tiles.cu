// A weight's listed slices in tiles, as weight_tiles.h says.
//   tile[j / 128, t, k / 64] at by_rows(j mod 128, k mod 64) = weight[column_list[j], depth_list[k], t]
// with zeros for columns and depths beyond the lists, and for depths beyond the count.
//
// Block: a tile. Grid: (taps * blocks of depth, groups of columns). A thread keeps its chunk of the depth and writes 16
//   bytes at a time.
// Needs:  lists within range; a result that starts on 16 bytes; 16-bit elements of any type.
// Allows: any strides of the weight, with int64 offsets; a count on the device.
// Copies bits.
#include "backends/cuda/kernels/elements.cuh"
#include "backends/cuda/kernels/launch.cuh"
#include "backends/cuda/kernels/weight_tiles.h"

namespace bap_kernels {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads, 1) weight_tiles_kernel(const __grid_constant__ WeightTilesParams p) {
  constexpr int kVector = Chunk<uint16_t>::kCount;
  const int tap = p.blocks.quotient(blockIdx.x), block = p.blocks.rest(blockIdx.x, tap);
  const int tap_h = p.kernel_w.quotient(tap), tap_w = p.kernel_w.rest(tap, tap_h);
  const int used = p.used != nullptr ? *p.used : p.depth;
  const uint16_t* weight = static_cast<const uint16_t*>(p.weight) + tap_h * p.stride_h + tap_w * p.stride_w;
  uint16_t* tile = static_cast<uint16_t*>(p.result) +
                   (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * kWeightTileElements;
  const int chunk = copy_chunk(threadIdx.x), first = block * kWeightTileDepth + chunk * kVector;
  int64_t depths[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    depths[v] = first + v < used ? listed_channel(p.depth_list, first + v) * p.stride_depth : 0;
  }
  for (int row = copy_row<kThreads>(threadIdx.x, 0); row < kWeightTileColumns; row += kThreads / kDepthChunks) {
    const int column = blockIdx.y * kWeightTileColumns + row;
    const bool there = column < p.columns;
    const uint16_t* from = weight + (there ? listed_channel(p.column_list, column) * p.stride_column : 0);
    Chunk<uint16_t> values;
#pragma unroll
    for (int v = 0; v < kVector; ++v) values.values[v] = there && first + v < used ? from[depths[v]] : uint16_t{0};
    store_chunk(tile + by_rows(row, chunk) / 2, values);
  }
}

Status launch_weight_tiles(const WeightTilesParams& p, void* stream) {
  const dim3 grid(p.taps * p.blocks.count(), ceil_div(p.columns, kWeightTileColumns));
  return launch(weight_tiles_kernel, p, grid, kThreads, 0, stream);
}

}  // namespace bap_kernels
