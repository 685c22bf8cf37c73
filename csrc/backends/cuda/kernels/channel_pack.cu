// A compact copy of listed channels in NHWC, with an optional transform.
//   result[n, p, i] = relu?(scale[i] * source[n, c, p] + shift[i])   with c = list[i], the list of the image's run,
//   zero for i from its length to `padded`
//
// Block: kPixels pixels x kChannels channels of one image, read along the axis on which the source is contiguous, in
//   128-bit vectors where alignment and list allow them, and written along channels in such vectors. Grid: (pixel tiles
//   * channel tiles, images).
// Shared memory: the tile, for sources whose pixels are contiguous.
// Needs: `padded` a multiple of 16 elements; lists within range. With a count on the device, channels beyond it are
//   written as zeros up to the end of its tile, and left alone in later tiles.
// Computes in float32.
#include "backends/cuda/kernels/instructions.cuh"
#include "backends/cuda/kernels/launch.cuh"

namespace bap_kernels {

constexpr int kPixels = 64, kChannels = 64, kThreads = 256;
// The odd gap keeps both the writes along pixels and the reads along channels off each other's banks.
constexpr int kLine = kPixels + 1;
constexpr int kSharedBytes = kChannels * kLine * 4;

template <typename scalar_t>
__device__ __forceinline__ const scalar_t* pixel_of(const ChannelPackParams& p, int image, int pixel) {
  const int h = p.width.quotient(pixel), w = p.width.rest(pixel, h);
  return static_cast<const scalar_t*>(p.source) + image * p.source_stride.n + h * p.source_stride.h +
         w * p.source_stride.w;
}

// Transforms channels from number i on, up to `used`, and stores them.
template <typename scalar_t>
__device__ __forceinline__ void finish(const ChannelPackParams& p, int image, int pixel, int i, int used,
                                       Chunk<scalar_t>& chunk) {
  if (p.scale.values != nullptr || p.shift.values != nullptr || p.relu) {
#pragma unroll
    for (int v = 0; v < Chunk<scalar_t>::kCount; ++v) {
      if (i + v < used) chunk.values[v] = transformed(p.scale, p.shift, p.relu, chunk.values[v], i + v);
    }
  }
  const int64_t line = static_cast<int64_t>(image) * p.height * p.width.count() + pixel;
  store_chunk(static_cast<scalar_t*>(p.result) + line * p.padded + i, chunk);
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1) channel_pack_kernel(const __grid_constant__ ChannelPackParams p) {
  constexpr int kVector = kChunkBytes / sizeof(scalar_t), kGroups = kChannels / kVector;
  const scalar_t zero = from_float<scalar_t>(0.0f);
  const int thread = threadIdx.x;
  const int pixel_tile = p.channel_tiles.quotient(blockIdx.x);
  const int first_channel = p.channel_tiles.rest(blockIdx.x, pixel_tile) * kChannels;
  const int first_pixel = pixel_tile * kPixels, pixels = p.height * p.width.count();
  const ImagePlace place = image_place(p.runs, blockIdx.y);
  const BatchRun& run = p.runs.of[place.run];
  const int used = p.used != nullptr ? *p.used : run.depth;
  if (p.used != nullptr && first_channel >= used) return;

  // The thread's channels of the result, in every pixel that it stores; pixels are kPixelStep apart.
  constexpr int kPixelStep = kThreads / kGroups;
  const int own_channel = thread % kGroups * kVector, i = first_channel + own_channel;
  if (p.source_stride.c == 1) {
    if (i >= p.padded) return;
    int channels[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) channels[v] = i + v < used ? listed_channel(run.list, i + v) : 0;
    const bool wide = p.channel_vector && i + kVector <= used;
    for (int pixel = thread / kGroups; pixel < kPixels && first_pixel + pixel < pixels; pixel += kPixelStep) {
      const scalar_t* from = pixel_of<scalar_t>(p, place.image, first_pixel + pixel);
      Chunk<scalar_t> chunk;
      if (wide) {
        load_chunk(chunk, from + channels[0]);
      } else {
#pragma unroll
        for (int v = 0; v < kVector; ++v) chunk.values[v] = i + v < used ? from[channels[v]] : zero;
      }
      finish(p, place.image, first_pixel + pixel, i, used, chunk);
    }
    return;
  }

  // Along pixels into the tile, several or one at a time; a thread keeps its pixels.
  const auto tile_at = [](int channel, int pixel) { return (channel * kLine + pixel) * 4; };
  if (p.pixel_vector) {
    constexpr int kLineChunks = kPixels / kVector;
    const int pixel = thread % kLineChunks * kVector;
    // Planes of whole chunks: one that begins within the plane ends there.
    const bool there = first_pixel + pixel < pixels;
    const scalar_t* from = pixel_of<scalar_t>(p, place.image, there ? first_pixel + pixel : 0);
    for (int channel = thread / kLineChunks; channel < kChannels; channel += kThreads / kLineChunks) {
      Chunk<scalar_t> chunk;
#pragma unroll
      for (int v = 0; v < kVector; ++v) chunk.values[v] = zero;
      if (there && first_channel + channel < used) {
        load_chunk(chunk, from + listed_channel(run.list, first_channel + channel) * p.source_stride.c);
      }
#pragma unroll
      for (int v = 0; v < kVector; ++v) shared<scalar_t>(tile_at(channel, pixel + v)) = chunk.values[v];
    }
  } else {
    const int pixel = thread % kPixels;
    const bool there = first_pixel + pixel < pixels;
    const scalar_t* from = pixel_of<scalar_t>(p, place.image, there ? first_pixel + pixel : 0);
    for (int channel = thread / kPixels; channel < kChannels; channel += kThreads / kPixels) {
      const bool read = there && first_channel + channel < used;
      shared<scalar_t>(tile_at(channel, pixel)) =
          read ? from[listed_channel(run.list, first_channel + channel) * p.source_stride.c] : zero;
    }
  }
  __syncthreads();
  if (i >= p.padded) return;
  for (int pixel = thread / kGroups; pixel < kPixels && first_pixel + pixel < pixels; pixel += kPixelStep) {
    Chunk<scalar_t> chunk;
#pragma unroll
    for (int v = 0; v < kVector; ++v) chunk.values[v] = shared<scalar_t>(tile_at(own_channel + v, pixel));
    finish(p, place.image, first_pixel + pixel, i, used, chunk);
  }
}

Status launch_channel_pack(const ChannelPackParams& p, MathMode mode, void* stream) {
  ChannelPackParams tiled = p;
  tiled.channel_tiles = divisor_of(ceil_div(p.padded, kChannels));
  const dim3 grid(ceil_div(p.height * p.width.count(), kPixels) * tiled.channel_tiles.count(), p.batch);
  return with_element(mode, [&](auto element) {
    return launch(channel_pack_kernel<decltype(element)>, tiled, grid, kThreads, kSharedBytes, stream);
  });
}

}  // namespace bap_kernels
