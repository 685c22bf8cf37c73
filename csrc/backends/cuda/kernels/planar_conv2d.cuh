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
  return dim3(row_tiles<Tile>(p, 1) * ceil_div(p.columns, Tile::kColumns), p.batch);
}

template <MathMode kMode, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    planar_conv2d_kernel(const __grid_constant__ ConvParams p) {
  using scalar_t = typename MathTraits<kMode>::scalar_t;
  using Epilogue = Epilogue<scalar_t, Tile, true>;
  constexpr int kBytes = sizeof(scalar_t), kVector = kChunkBytes / kBytes, kDepth = kDepthBytes / kBytes;
  constexpr int kThreads = Tile::kThreads;
  const int thread = threadIdx.x;
  const TilePlace tile = tile_place(blockIdx.x, row_tiles<Tile>(p, 1), p.column_tiles);
  const int first_row = tile.row * Tile::kRows, first_column = tile.column * Tile::kColumns;
  const int rows = p.pixels;
  const ImagePlace image = image_place(p.runs, blockIdx.y);
  const BatchRun& run = p.runs.of[image.run];
  const int depth = p.depth != nullptr ? *p.depth : run.depth;
  const int steps = ceil_div(depth, kDepth);
  if (first_column >= stored_columns(p) && !p.reduce_off) return;

  // The thread's channel of a block of channels; any that is there where it copies none.
  const int place = copy_depth<kThreads, kBytes>(thread);
  const auto look_up = [&](int block) {
    const int k = block * kDepth + place;
    return k < depth ? listed_channel(run.list, k) : 0;
  };
  const scalar_t* pixels = static_cast<const scalar_t*>(p.source) + image.image * p.source_stride.n;
  int channel = look_up(0), next_channel = look_up(1), block = 0;
  FilterCopies<scalar_t, Tile::kColumns, kThreads> filters;
  filters.begin(run, first_column, p.columns, thread);
  const auto copy_pixels = [&]<bool kWhole>(std::bool_constant<kWhole>, int to) {
    const scalar_t* plane = pixels + channel * p.source_stride.c + first_row;
    const bool listed = block * kDepth + place < depth;
#pragma unroll
    for (int i = 0; i < Tile::kRows * kDepth / kVector / kThreads; ++i) {
      const int chunk = copy_depth_chunk<kThreads, kBytes>(thread, i), pixel = first_row + chunk * kVector;
      copy_chunk_unless<kWhole>(!listed || pixel >= rows, to + by_depth<Tile::kRows, kBytes>(place, chunk),
                                plane + chunk * kVector, kWhole ? kChunkBytes : chunk_bytes<kBytes>(pixel, rows));
    }
  };
  const auto copy = [&](int to) {
    // Planes that end within a chunk are rare: they have a gap behind them.
    if (rows % kVector == 0) {
      copy_pixels(std::true_type(), to);
    } else {
      copy_pixels(std::false_type(), to);
    }
    const int k = block * kDepth;
    if (k + kDepth <= depth) {
      filters.template copy<true>(to + Tile::kColumnsAt, k, kChunkBytes, thread);
    } else {
      const int bytes = chunk_bytes<kBytes>(k + copy_chunk(thread) * kVector, depth);
      filters.template copy<false>(to + Tile::kColumnsAt, k, bytes, thread);
    }
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
    const RowPlace at = row_place(m, p.plans_h[0].count, p.plans_w[0].count);
    Epilogue::write_row(p, row, m < rows, image.image, at.row, at.column);
  }
  if (p.copy != nullptr) Epilogue::clear_places();
  __syncthreads();
  if (p.copy != nullptr) {
    Epilogue::find_places(p, first_column);
    __syncthreads();
  }
  if (p.partial != nullptr) {
    const int64_t term = static_cast<int64_t>(blockIdx.y) * row_tiles<Tile>(p, 1) + tile.row;
    Epilogue::reduce(p, first_column, term);
  }
  if (p.result != nullptr) Epilogue::store(p, first_column);
}

}  // namespace bap_kernels
