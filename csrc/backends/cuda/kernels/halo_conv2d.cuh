// The gathered convolution with a halo: the forward for any list and any strides of the source.
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
// Block: a tile of Tile::kRows pixels of one image x Tile::kColumns channels. Grid: (tiles * column tiles, images).
// Shared memory: kStages of the weight, the halo, the staged planes; then the result in float32 and offsets.
// Needs:  at least two taps, so that a staged block has arrived when it is turned; lists within range; for staging
//   what halo_copy_bytes says. A halo that fits: choose_halo.
// Allows: any strides of source, result and residual, with int64 offsets; a count of channels on the device; within the
//   source a prologue, x' = relu?(source_scale[k] * x + source_shift[k]); mixed batches.
// Accumulates in float32. No atomics: the result does not vary between runs.
#pragma once

#include "backends/cuda/kernels/halo_shape.h"
#include "backends/cuda/kernels/nhwc_operands.cuh"

namespace bap_kernels {

template <class Tile>
dim3 halo_grid(const HaloParams& p) {
  const int tiles = ceil_div(p.conv.axis_h.output, p.shape.tile_h) * ceil_div(p.conv.axis_w.output, p.shape.tile_w);
  return dim3(tiles * ceil_div(p.conv.columns, Tile::kColumns), p.conv.batch);
}
// The parameters of a launch with this tile.
template <class Tile>
HaloParams with_tiles(HaloParams p) {
  p.conv = with_tiles<Tile>(p.conv);
  p.tiles_w = divisor_of(ceil_div(p.conv.axis_w.output, p.shape.tile_w));
  p.tiles = ceil_div(p.conv.axis_h.output, p.shape.tile_h) * p.tiles_w.count();
  p.stride_w = divisor_of(p.conv.axis_w.stride);
  return p;
}

// What a block computes, and what each thread does for its halo.
template <typename scalar_t, class Tile>
struct Halo {
  using Memory = HaloMemory<Tile>;
  static constexpr int kBytes = sizeof(scalar_t);
  static constexpr int kVector = kChunkBytes / kBytes;
  static constexpr int kDepth = kDepthBytes / kBytes;
  static constexpr int kThreads = Tile::kThreads;

  const HaloParams& p;
  HaloShape shape;
  ConvAxis h, w;
  int run, image, depth, first_h, first_w, first_column;
  int source_h, source_w;     // the halo's first pixel in the source
  int channel, next_channel;  // that the thread stages

  __device__ __forceinline__ explicit Halo(const HaloParams& params)
      : p(params), shape(p.shape), h(p.conv.axis_h), w(p.conv.axis_w) {
    const TilePlace tile = tile_place(blockIdx.x, p.tiles, p.conv.column_tiles);
    const int line = p.tiles_w.quotient(tile.row);
    first_h = line * shape.tile_h;
    first_w = p.tiles_w.rest(tile.row, line) * shape.tile_w;
    first_column = tile.column * Tile::kColumns;
    source_h = first_h * h.stride - h.before;
    source_w = first_w * w.stride - w.before;
    const ImagePlace at = image_place(p.conv.runs, blockIdx.y);
    run = at.run;
    image = at.image;
    depth = p.conv.depth != nullptr ? *p.conv.depth : p.conv.runs.of[run].depth;
    channel = staged_channel(0);
    next_channel = staged_channel(1);
  }

  __device__ __forceinline__ int look_up(int k) const {
    const ListParams& list = p.conv.runs.of[run].list;
    return k < depth ? listed_channel(list, k) : 0;
  }
  __device__ __forceinline__ int staged_channel(int block) const {
    return look_up(block * kDepth + copy_depth<kThreads, kBytes>(threadIdx.x));
  }

  // Starts the copies of the planes of a block of channels. A thread copies some of each row of one channel.
  __device__ __forceinline__ void stage(int block) {
    if (shape.copy_bytes == 16) {
      stage_planes<16>(block);
    } else if (shape.copy_bytes == 8) {
      stage_planes<8>(block);
    } else {
      stage_planes<4>(block);
    }
    channel = next_channel;
    next_channel = staged_channel(block + 2);
  }
  template <int kWidth>
  __device__ __forceinline__ void stage_planes(int block) const {
    constexpr int kUnit = kWidth / kBytes, kChannelThreads = depth_threads<kThreads, kBytes>();
    const int place = copy_depth<kThreads, kBytes>(threadIdx.x);
    if (place >= shape.staged_channels) return;
    const scalar_t* source = static_cast<const scalar_t*>(p.conv.source);
    const Strides& stride = p.conv.source_stride;
    const scalar_t* plane = source + image * stride.n + channel * stride.c;
    const bool there = block * kDepth + place < depth;
    const int first = source_w - shape.lead;
    int unit = threadIdx.x % kChannelThreads, row = 0;
    int to = Memory::staged_at(shape) + place * shape.rows * shape.row_bytes() + unit * kWidth;
    while (unit >= shape.units) unit -= shape.units, ++row;
    while (row < shape.rows) {
      const int at_h = source_h + row, at_w = first + unit * kUnit;
      const bool inside = there && within(at_h, h.input) && within(at_w, w.input);
      const int left = (w.input - at_w) * kBytes;
      const int bytes = !inside ? 0 : left < kWidth ? left : kWidth;
      copy_async<kWidth>(to, bytes > 0 ? plane + at_h * stride.h + at_w : source, bytes);
      to += kChannelThreads * kWidth;
      unit += kChannelThreads;
      while (unit >= shape.units) unit -= shape.units, ++row;
    }
  }

  // Calls body(pixel, row, column) for the halo's pixels `first`, `first` + kStep, ...; column as in the source's rows.
  template <int kStep, class Body>
  __device__ __forceinline__ void for_pixels(int first, Body&& body) const {
    int row = 0, place = first;
    for (int pixel = first; pixel < shape.pixels(); pixel += kStep, place += kStep) {
      while (place >= shape.line) place -= shape.line, ++row;
      body(pixel, row, halo_column(shape, w.stride, place));
    }
  }
  __device__ __forceinline__ bool within_source(int row, int column) const {
    return column < shape.columns && within(source_h + row, h.input) && within(source_w + column, w.input);
  }
  // The prologue, of elements `k` and on of the list at a pixel within the source.
  __device__ __forceinline__ void transform(int k, Chunk<scalar_t>& chunk) const {
    if (!p.prologue) return;
    const ConvParams& c = p.conv;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      if (k + v >= depth) continue;
      chunk.values[v] = transformed(c.source_scale, c.source_shift, c.source_relu, chunk.values[v], k + v);
    }
  }

  // Turns the staged planes into the halo: a thread writes one chunk of channels for pixels that are a warp apart.
  __device__ __forceinline__ void turn(int block) const {
    const int staged = Memory::staged_at(shape), plane = shape.rows * shape.row_bytes();
    for (int chunk = threadIdx.x / kWarp; chunk < kDepthChunks; chunk += kThreads / kWarp) {
      const bool there = chunk * kVector < shape.staged_channels;
      for_pixels<kWarp>(threadIdx.x % kWarp, [&](int pixel, int row, int column) {
        const int from = staged + chunk * kVector * plane + row * shape.row_bytes() + (shape.lead + column) * kBytes;
        const bool read = there && column < shape.columns;
        Chunk<scalar_t> values;
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          values.values[v] = read ? shared<scalar_t>(from + v * plane) : from_float<scalar_t>(0.0f);
        }
        if (within_source(row, column)) transform(block * kDepth + chunk * kVector, values);
        store_chunk(&shared<scalar_t>(Memory::kHaloAt + by_rows(pixel, chunk)), values);
      });
    }
  }

  // Gathers a block of channels into the halo, element by element; zeros outside the source and behind its channels.
  __device__ __forceinline__ void gather(int block) const {
    if (p.planes) {
      for (int chunk = threadIdx.x / kWarp; chunk < kDepthChunks; chunk += kThreads / kWarp) {
        gather_chunk<kWarp>(block, chunk, threadIdx.x % kWarp);
      }
    } else {
      gather_chunk<kThreads / kDepthChunks>(block, copy_chunk(threadIdx.x), threadIdx.x / kDepthChunks);
    }
  }
  template <int kStep>
  __device__ __forceinline__ void gather_chunk(int block, int chunk, int first) const {
    const Strides& stride = p.conv.source_stride;
    const scalar_t* pixels = static_cast<const scalar_t*>(p.conv.source) + image * stride.n;
    int64_t channels[kVector];
    const int k = block * kDepth + chunk * kVector;
#pragma unroll
    for (int v = 0; v < kVector; ++v) channels[v] = look_up(k + v) * stride.c;
    for_pixels<kStep>(first, [&](int pixel, int row, int column) {
      const bool inside = within_source(row, column);
      const scalar_t* from = pixels + (source_h + row) * stride.h + (source_w + column) * stride.w;
      Chunk<scalar_t> values;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        values.values[v] = inside && k + v < depth ? from[channels[v]] : from_float<scalar_t>(0.0f);
      }
      if (inside) transform(k, values);
      store_chunk(&shared<scalar_t>(Memory::kHaloAt + by_rows(pixel, chunk)), values);
    });
  }

  // The fragments of the tile's rows that lie `move` behind their pixels, for slice `slice` of the depth.
  __device__ __forceinline__ void load_rows(FragmentsA<Tile>& a, int move, int slice) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < Tile::kMmasM; ++i) {
      const int pixel = halo_pixel(shape, h.stride, warp_row<Tile>() + i * kMmaRows + matrix_row_a(lane)) + move;
      load_matrices(a[i], Memory::kHaloAt + by_rows(pixel, 2 * slice + matrix_chunk_a(lane)));
    }
  }
};

template <MathMode kMode, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    halo_conv2d_kernel(const __grid_constant__ HaloParams p) {
  using scalar_t = typename MathTraits<kMode>::scalar_t;
  using Rows = Epilogue<scalar_t, Tile, false>;
  using Planes = Epilogue<scalar_t, Tile, true>;
  constexpr int kBytes = sizeof(scalar_t), kThreads = Tile::kThreads, kStages = Tile::kStages;
  constexpr int kStageBytes = HaloMemory<Tile>::kStageBytes;
  static_assert(kStages <= 3, "what is staged at a block's first step arrives within two taps");
  Halo<scalar_t, Tile> halo(p);
  const HaloShape& shape = halo.shape;
  const bool staged = shape.copy_bytes > 0;
  const int taps = halo.h.kernel * halo.w.kernel;
  const int steps = ceil_div(halo.depth, kDepthBytes / kBytes) * taps;

  // The weight of the next step, into the stage that begins at byte `to`.
  const BatchRun& run = p.conv.runs.of[halo.run];
  constexpr int kDepth = kDepthBytes / kBytes;
  FilterCopies<scalar_t, Tile::kColumns, kThreads> filters;
  filters.begin(run, halo.first_column, p.conv.columns, threadIdx.x);
  int copied_depth = 0, copied_tap = 0;
  int64_t copied = 0;
  const auto copy = [&](int to) {
    if (copied_depth + kDepth <= halo.depth) {
      filters.template copy<true>(to, copied, kChunkBytes, threadIdx.x);
    } else {
      const int k = copied_depth + copy_chunk(threadIdx.x) * (kChunkBytes / kBytes);
      filters.template copy<false>(to, copied, chunk_bytes<kBytes>(k, halo.depth), threadIdx.x);
    }
    copied += run.stride_weight_tap;
    if (++copied_tap == taps) copied_tap = 0, copied_depth += kDepth, copied = copied_depth;
  };

  if (staged) halo.stage(0);
  Sums<Tile> sums = {};
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) copy(stage * kStageBytes);
    commit_copies();
  }
  int read = 0, written = kStages - 1;
  for (int step = 0, block = 0, tap_h = 0, tap_w = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    // The copies of all threads are there, and what was read in the step before may be overwritten.
    __syncthreads();
    if (tap_h == 0 && tap_w == 0) {
      if (staged) {
        halo.turn(block);
      } else {
        halo.gather(block);
      }
      __syncthreads();
      // The next block's planes are part of the group of copies that this step commits.
      if (staged && step + taps < steps) halo.stage(block + 1);
    }
    if (step + kStages - 1 < steps) copy(written * kStageBytes);
    commit_copies();
    const int move = halo_tap(shape, halo.h, halo.w, p.stride_w, tap_h, tap_w);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      FragmentsA<Tile> a;
      FragmentsB<Tile> b;
      halo.load_rows(a, move, slice);
      load_b<Tile, kBytes, false>(b, read * kStageBytes, slice);
      multiply<kMode, Tile>(sums, a, b);
    }
    if (++tap_w == halo.w.kernel) tap_w = 0, ++tap_h;
    if (tap_h == halo.h.kernel) tap_h = 0, ++block;
    read = read + 1 == kStages ? 0 : read + 1;
    written = written + 1 == kStages ? 0 : written + 1;
  }
  wait_for_copies<0>();
  __syncthreads();

  if (p.planar_result) {
    Planes::stage_sums(sums);
  } else {
    Rows::stage_sums(sums);
  }
  for (int row = threadIdx.x; row < Tile::kRows; row += kThreads) {
    const int h = halo.first_h + (row >> shape.tile_w_log), w = halo.first_w + (row & (shape.tile_w - 1));
    Rows::write_row(p.conv, row, h < halo.h.output && w < halo.w.output, halo.image, h, w);
  }
  if (p.conv.copy != nullptr) Rows::clear_places();
  __syncthreads();
  if (p.conv.copy != nullptr) {
    Rows::find_places(p.conv, halo.first_column);
    __syncthreads();
  }
  if (p.planar_result) {
    Planes::store(p.conv, halo.first_column);
  } else {
    Rows::store(p.conv, halo.first_column);
  }
}

}  // namespace bap_kernels
