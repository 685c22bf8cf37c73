// A compact copy of listed channels in NHWC, with an optional transform.
//   result[n, p, i] = relu?(scale[i] * source[n, c, p] + shift[i])   with c = list[i], the list of the image's run,
//   zero for i from its length to `padded`
//
// Block: kPixels pixels x kChannels channels of one image, read along the axis on which the source is contiguous,
//   written along channels in 128-bit vectors. Grid: (pixel tiles * channel tiles, images).
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

// The element of the tile, zero beyond the source's pixels and channels.
template <typename scalar_t>
__device__ __forceinline__ scalar_t element(const ChannelPackParams& p, const BatchRun& run, int image, int pixel,
                                            int i, int used) {
  if (pixel >= p.height * p.width || i >= used) return from_float<scalar_t>(0.0f);
  const int h = pixel / p.width, w = pixel - h * p.width;
  const int64_t channel = listed_channel(run.list.entries, run.list.block, i);
  const int64_t at =
      image * p.source_stride.n + channel * p.source_stride.c + h * p.source_stride.h + w * p.source_stride.w;
  const scalar_t from = static_cast<const scalar_t*>(p.source)[at];
  if (p.scale.values == nullptr && p.shift.values == nullptr && !p.relu) return from;
  return transformed(p.scale, p.shift, p.relu, from, i);
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1) channel_pack_kernel(const __grid_constant__ ChannelPackParams p) {
  constexpr int kVector = kChunkBytes / sizeof(scalar_t), kGroups = kChannels / kVector;
  const int channel_tiles = ceil_div(p.padded, kChannels);
  const int first_channel = static_cast<int>(blockIdx.x) % channel_tiles * kChannels;
  const int first_pixel = static_cast<int>(blockIdx.x) / channel_tiles * kPixels;
  const ImagePlace place = image_place(p.runs, blockIdx.y);
  const BatchRun& run = p.runs.of[place.run];
  const int used = p.used != nullptr ? *p.used : run.depth;
  if (p.used != nullptr && first_channel >= used) return;

  const bool by_channels = p.source_stride.c == 1;
  if (!by_channels) {
    for (int k = threadIdx.x; k < kPixels * kChannels; k += kThreads) {
      const int pixel = k % kPixels, channel = k / kPixels;
      shared<scalar_t>((channel * kLine + pixel) * 4) =
          element<scalar_t>(p, run, place.image, first_pixel + pixel, first_channel + channel, used);
    }
    __syncthreads();
  }
  scalar_t* result = static_cast<scalar_t*>(p.result);
  for (int k = threadIdx.x; k < kPixels * kGroups; k += kThreads) {
    const int pixel = k / kGroups, channel = k % kGroups * kVector;
    if (first_pixel + pixel >= p.height * p.width || first_channel + channel >= p.padded) continue;
    Chunk<scalar_t> chunk;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      chunk.values[v] =
          by_channels ? element<scalar_t>(p, run, place.image, first_pixel + pixel, first_channel + channel + v, used)
                      : shared<scalar_t>(((channel + v) * kLine + pixel) * 4);
    }
    const int64_t line = static_cast<int64_t>(place.image) * p.height * p.width + first_pixel + pixel;
    store_chunk(result + line * p.padded + first_channel + channel, chunk);
  }
}

Status launch_channel_pack(const ChannelPackParams& p, MathMode mode, void* stream) {
  const dim3 grid(ceil_div(p.height * p.width, kPixels) * ceil_div(p.padded, kChannels), p.batch);
  return with_element(mode, [&](auto element) {
    return launch(channel_pack_kernel<decltype(element)>, p, grid, kThreads, kSharedBytes, stream);
  });
}

}  // namespace bap_kernels
