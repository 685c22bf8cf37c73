// What one block of two small kernels computes.
//
// ChannelPack: a compact copy of listed channels in NHWC, with an optional transform.
//   result[n, p, i] = relu?(scale[i] * source[n, c, p] + shift[i])   with c = list[i], the list of the image's run,
//   zero for i from its length to `padded` Block: kPixels pixels x kChannels channels of one image, read along the axis
//   on which the source is contiguous,
//     written along channels in 128-bit vectors. Grid: (pixel tiles * channel tiles, images).
//   Needs: `padded` a multiple of 16 elements; lists within range. With a count on the device, channels beyond it are
//     written as zeros up to the end of its tile, and left alone in later tiles.
//   Shared memory: the tile, for sources whose pixels are contiguous.
//
// SumPartials: result[row_list[j], column_list[i], kh, kw] = sum over chunks s, in order, of partial[s, j, t, i].
//   A thread adds one entry. Grid: (entries).
// Computes in float32. No atomics: the result does not vary between runs.
#pragma once

#include "backends/cuda/kernels/block_parts.h"

namespace bap_kernels {

template <typename scalar_t_>
struct ChannelPack {
  using scalar_t = scalar_t_;
  static constexpr int kBytes = sizeof(scalar_t), kVector = kChunkBytes / kBytes;
  static constexpr int kPixels = 64, kChannels = 64, kThreads = 256;
  // The odd gap keeps both the writes along pixels and the reads along channels off each other's banks.
  static constexpr int kLine = kPixels + 1;
  static constexpr int kSharedBytes = kChannels * kLine * 4;
  struct State {};

  BAP_HOST_DEVICE static int channel_tiles(const ChannelPackParams& p) { return ceil_div(p.padded, kChannels); }
  BAP_HOST_DEVICE static int grid_x(const ChannelPackParams& p) {
    return ceil_div(p.height * p.width, kPixels) * channel_tiles(p);
  }
  BAP_HOST_DEVICE static int grid_y(const ChannelPackParams& p) { return p.batch; }

  // The element of the tile, zero beyond the source's pixels and channels.
  BAP_DEVICE static scalar_t element(const ChannelPackParams& p, const BatchRun& run, int image, int pixel, int i,
                                     int used) {
    if (pixel >= p.height * p.width || i >= used) return from_float<scalar_t>(0.0f);
    const int h = pixel / p.width, w = pixel - h * p.width;
    const int64_t channel = listed_channel(run.list.entries, run.list.block, i);
    const int64_t at =
        image * p.source_stride.n + channel * p.source_stride.c + h * p.source_stride.h + w * p.source_stride.w;
    const scalar_t from = static_cast<const scalar_t*>(p.source)[at];
    if (p.scale.values == nullptr && p.shift.values == nullptr && !p.relu) return from;
    return transformed(p.scale, p.shift, p.relu, from, i);
  }

  template <class Block>
  BAP_DEVICE static void run(Block& b, const ChannelPackParams& p) {
    const int first_channel = b.block_x() % channel_tiles(p) * kChannels;
    const int first_pixel = b.block_x() / channel_tiles(p) * kPixels;
    const ImagePlace place = image_place(p.runs, b.block_y());
    const BatchRun& run = p.runs.of[place.run];
    const int image = place.image;
    const int used = p.used != nullptr ? *p.used : run.depth;
    if (p.used != nullptr && first_channel >= used) return;
    const bool by_channels = p.source_stride.c == 1;
    if (!by_channels) {
      b.each([&](int thread, State&) {
        for (int k = thread; k < kPixels * kChannels; k += kThreads) {
          const int pixel = k % kPixels, channel = k / kPixels;
          b.template store<scalar_t>(thread, (channel * kLine + pixel) * 4,
                                     element(p, run, image, first_pixel + pixel, first_channel + channel, used));
        }
      });
      b.sync();
    }
    scalar_t* result = static_cast<scalar_t*>(p.result);
    b.each([&](int thread, State&) {
      constexpr int kGroups = kChannels / kVector;
      for (int k = thread; k < kPixels * kGroups; k += kThreads) {
        const int pixel = k / kGroups, channel = k % kGroups * kVector;
        if (first_pixel + pixel >= p.height * p.width || first_channel + channel >= p.padded) continue;
        Chunk<scalar_t> chunk;
        BAP_UNROLL
        for (int v = 0; v < kVector; ++v) {
          chunk.values[v] = by_channels ? element(p, run, image, first_pixel + pixel, first_channel + channel + v, used)
                                        : b.template load<scalar_t>(thread, ((channel + v) * kLine + pixel) * 4);
        }
        const int64_t line = static_cast<int64_t>(image) * p.height * p.width + first_pixel + pixel;
        store_chunk(result + line * p.padded + first_channel + channel, chunk);
      }
    });
  }
};

template <typename scalar_t_>
struct SumPartials {
  using scalar_t = scalar_t_;
  static constexpr int kThreads = 256, kSharedBytes = 0;
  struct State {};

  BAP_HOST_DEVICE static int grid_x(const SumPartialsParams& p) {
    return ceil_div(p.rows * p.taps * p.columns, kThreads);
  }
  BAP_HOST_DEVICE static int grid_y(const SumPartialsParams&) { return 1; }

  template <class Block>
  BAP_DEVICE static void run(Block& b, const SumPartialsParams& p) {
    b.each([&](int thread, State&) {
      const int e = b.block_x() * kThreads + thread;
      if (e >= p.rows * p.taps * p.columns) return;
      const int i = e % p.columns, tap = e / p.columns % p.taps, j = e / p.columns / p.taps;
      if (p.used != nullptr && i >= *p.used) return;
      const float* terms = p.partial + j * p.stride_row + tap * p.stride_tap + i;
      float sum = 0.0f;
      for (int s = 0; s < p.chunks; ++s) sum += terms[s * p.stride_chunk];
      const int64_t row = listed_channel(p.row_list.entries, p.row_list.block, j);
      const int64_t column = listed_channel(p.column_list.entries, p.column_list.block, i);
      const int64_t at = row * p.result_stride.n + column * p.result_stride.c + tap / p.kernel_w * p.result_stride.h +
                         tap % p.kernel_w * p.result_stride.w;
      if (p.result_is_float) {
        static_cast<float*>(p.result)[at] = sum;
      } else {
        static_cast<scalar_t*>(p.result)[at] = from_float<scalar_t>(sum);
      }
    });
  }
};

}  // namespace bap_kernels
