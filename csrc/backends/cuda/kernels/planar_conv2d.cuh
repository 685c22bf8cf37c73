// The gathered 1x1 convolution of planes (NCHW), stride 1 without padding: a GEMM of each image, forward only.
//   result[m, j] = relu?(scale[j] * (sum over k of source[pixel m, channel(k)] * weight[j, k] + bias[o])
//                        + shift[j] + residual[m, j])    with o = result_list[j]
//
// Block: Tile::kRows pixels of one image x Tile::kColumns channels. Grid: (tiles, images).
// A thread copies several chunks of pixels of one channel: any list costs one look-up per thread and block of channels.
// Shared memory: kStages of both operands, the source's as [channel][pixel], filled kStages - 1 steps ahead; then the
//   result in float32 and offsets.
// Needs:  planes and weights of 16-byte aligned chunks; lists within range; batch * pixels below 2^31.
// Allows: any list; any strides of result, residual and input, with int64 offsets; counts on the device; mixed batches.
// Accumulates in float32. No atomics: the result does not vary between runs.
#pragma once

#include "backends/cuda/kernels/nhwc_operands.cuh"
#include "backends/cuda/kernels/pipeline.cuh"

namespace bap_kernels {

template <class Tile>
dim3 planar_grid(const ConvParams& p) {
  return dim3(row_tiles<Tile>(p, 1, false) * column_tiles<Tile>(p), p.batch);
}

template <MathMode kMode, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    planar_conv2d_kernel(const __grid_constant__ ConvParams p) {
  using scalar_t = typename MathTraits<kMode>::scalar_t;
  using Epilogue = Epilogue<scalar_t, Tile, true>;
  constexpr int kBytes = sizeof(scalar_t), kVector = kChunkBytes / kBytes, kDepth = kDepthBytes / kBytes;
  constexpr int kThreads = Tile::kThreads;
  const int thread = threadIdx.x;
  const TilePlace tile = tile_place(blockIdx.x, row_tiles<Tile>(p, 1, false), column_tiles<Tile>(p), kTileGroup);
  const int first_row = tile.row * Tile::kRows, first_column = tile.column * Tile::kColumns;
  const int width = p.axis_w.output, rows = p.axis_h.output * width;
  const ImagePlace image = image_place(p.runs, blockIdx.y);
  const BatchRun& run = p.runs.of[image.run];
  const int depth = p.depth != nullptr ? *p.depth : run.depth;
  const int steps = ceil_div(depth, kDepth);
  if (first_column >= stored_columns(p) && !p.reduce_off) return;

  // The thread's channel of a block of channels; any that is there where it copies none.
  const int place = copy_depth<kThreads, kBytes>(thread);
  const auto look_up = [&](int block) {
    const int k = block * kDepth + place;
    return k < depth ? listed_channel(run.list.entries, run.list.block, k) : 0;
  };
  const scalar_t* source = static_cast<const scalar_t*>(p.source);
  const scalar_t* pixels = source + image.image * p.source_stride.n;
  int channel = look_up(0), next_channel = look_up(1), block = 0;
  const auto copy = [&](int to) {
    const scalar_t* plane = pixels + channel * p.source_stride.c;
    const bool listed = block * kDepth + place < depth;
#pragma unroll
    for (int i = 0; i < Tile::kRows * kDepth / kVector / kThreads; ++i) {
      const int chunk = copy_depth_chunk<kThreads, kBytes>(thread, i);
      const int pixel = first_row + chunk * kVector;
      const int bytes = listed ? chunk_bytes<kBytes>(pixel, rows) : 0;
      copy_async(to + by_depth<Tile::kRows, kBytes>(place, chunk), bytes > 0 ? plane + pixel : source, bytes);
    }
    copy_weight<scalar_t, Tile::kColumns, kThreads>(run, to + Tile::kColumnsAt, first_column, p.columns, 0,
                                                    block * kDepth, depth, thread);
    ++block;
    channel = next_channel;
    next_channel = look_up(block + 1);
  };

  Sums<Tile> sums = {};
  multiply_steps<kMode, Tile, true, false>(sums, steps, copy);
  __syncthreads();

  Epilogue::stage_sums(sums);
  for (int row = thread; row < Tile::kRows; row += kThreads) {
    const int m = first_row + row;
    Epilogue::write_row(p, row, m < rows, image.image, m / width, m % width);
  }
  if (p.copy != nullptr) Epilogue::clear_places();
  __syncthreads();
  if (p.copy != nullptr) {
    Epilogue::find_places(p, first_column);
    __syncthreads();
  }
  if (p.partial != nullptr) {
    const int64_t term = static_cast<int64_t>(blockIdx.y) * row_tiles<Tile>(p, 1, false) + tile.row;
    Epilogue::reduce(p, first_column, term);
  }
  if (p.result != nullptr) Epilogue::store(p, first_column);
}

}  // namespace bap_kernels
