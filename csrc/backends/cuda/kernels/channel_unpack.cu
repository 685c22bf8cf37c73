// The inverse of a compact copy: spreads channels, and turns NHWC into planes.
//   result[n, list[i], p] = source[n, p, i]      for i below the list's length, or below the count on the device
//   result[n, c, p]       = 0                    for every other channel c: nothing need be cleared before
//
// Block: kPixels pixels x kChannels channels of the result in one image. Grid: (pixel tiles * channel tiles, images).
//   The block goes through the list once to see which of its channels are listed; any order of the list will do. It
//   reads along the channels of the source and writes along pixels, in 128-bit vectors where the result allows it.
// Shared memory: the places of the block's channels in the source, and the tile.
// Needs:  a list within range, of different channels.
// Allows: any strides of the result, with int64 offsets; a count on the device.
// Copies bits. No atomics: each place has one writer, since no channel is listed twice.
#include "backends/cuda/kernels/instructions.cuh"
#include "backends/cuda/kernels/launch.cuh"

namespace bap_kernels {

constexpr int kPixelShift = 6, kPixels = 1 << kPixelShift, kChannels = 64, kThreads = 256;
// The odd gap keeps the writes along channels off each other's banks.
constexpr int kLine = kPixels + 1;
constexpr int kTileAt = kChannels * 4;
constexpr int kSharedBytes = kTileAt + kChannels * kLine * 4;
constexpr int kNowhere = -1;

__device__ __forceinline__ int tile_at(int channel, int pixel) { return kTileAt + (channel * kLine + pixel) * 4; }

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1) channel_unpack_kernel(const __grid_constant__ ChannelUnpackParams p) {
  constexpr int kVector = kChunkBytes / sizeof(scalar_t);
  const int pixel_tile = p.channel_tiles.quotient(blockIdx.x), pixels = p.height * p.width;
  const int first_channel = p.channel_tiles.rest(blockIdx.x, pixel_tile) * kChannels;
  const int first_pixel = pixel_tile * kPixels;
  const int64_t image = blockIdx.y;
  const int used = p.used != nullptr && *p.used < p.depth ? *p.used : p.depth;

  // Of each channel of the block: its place in the source, or kNowhere.
  if (threadIdx.x < kChannels) {
    const int channel = first_channel + threadIdx.x;
    shared<int>(threadIdx.x * 4) = p.list.block == 0 && channel < used ? channel : kNowhere;
  }
  __syncthreads();
  if (p.list.block != 0) {
    for (int i = threadIdx.x; i < used; i += kThreads) {
      const int channel = listed_channel(p.list, i) - first_channel;
      if (within(channel, kChannels)) shared<int>(channel * 4) = i;
    }
    __syncthreads();
  }

  // A thread keeps its channel.
  const int own_channel = threadIdx.x % kChannels, own_place = shared<int>(own_channel * 4);
  if (own_place != kNowhere) {
    const scalar_t* source = static_cast<const scalar_t*>(p.source) + (image * pixels + first_pixel) * p.padded;
    for (int pixel = threadIdx.x / kChannels; pixel < kPixels && first_pixel + pixel < pixels;
         pixel += kThreads / kChannels) {
      shared<scalar_t>(tile_at(own_channel, pixel)) = source[static_cast<int64_t>(pixel) * p.padded + own_place];
    }
  }
  __syncthreads();

  scalar_t* result = static_cast<scalar_t*>(p.result) + image * p.result_stride.n;
  // Elements of a store, 2^shift, and stores of a channel's pixels, a power of two as well.
  constexpr int kVectorShift = kVector == 8 ? 3 : 2;
  const int shift = p.result_vector ? kVectorShift : 0, group_shift = kPixelShift - shift;
  for (int k = threadIdx.x; k < kChannels << group_shift; k += kThreads) {
    const int channel = k >> group_shift, pixel = (k & ((1 << group_shift) - 1)) << shift;
    if (first_channel + channel >= p.channels) break;
    if (first_pixel + pixel >= pixels) continue;
    const bool listed = shared<int>(channel * 4) != kNowhere;
    scalar_t* plane = result + (first_channel + channel) * p.result_stride.c;
    if (p.result_vector) {
      // Planes of whole chunks: one that begins within the plane ends there.
      Chunk<scalar_t> chunk;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        chunk.values[v] = listed ? shared<scalar_t>(tile_at(channel, pixel + v)) : from_float<scalar_t>(0.0f);
      }
      store_chunk(plane + first_pixel + pixel, chunk);
    } else {
      const int h = (first_pixel + pixel) / p.width, w = first_pixel + pixel - h * p.width;
      plane[h * p.result_stride.h + w * p.result_stride.w] =
          listed ? shared<scalar_t>(tile_at(channel, pixel)) : from_float<scalar_t>(0.0f);
    }
  }
}

Status launch_channel_unpack(const ChannelUnpackParams& p, MathMode mode, void* stream) {
  ChannelUnpackParams tiled = p;
  tiled.channel_tiles = divisor_of(ceil_div(p.channels, kChannels));
  const dim3 grid(ceil_div(p.height * p.width, kPixels) * tiled.channel_tiles.count(), p.batch);
  return with_element(mode, [&](auto element) {
    return launch(channel_unpack_kernel<decltype(element)>, tiled, grid, kThreads, kSharedBytes, stream);
  });
}

}  // namespace bap_kernels
