// What one block of the inverse of a compact copy computes: it spreads channels, and turns NHWC into planes.
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
#pragma once

#include "backends/cuda/kernels/block_parts.h"

namespace bap_kernels {

template <typename scalar_t_>
struct ChannelUnpack {
  using scalar_t = scalar_t_;
  static constexpr int kBytes = sizeof(scalar_t), kVector = kChunkBytes / kBytes;
  static constexpr int kPixels = 64, kChannels = 64, kThreads = 256;
  // The odd gap keeps the writes along channels off each other's banks.
  static constexpr int kLine = kPixels + 1;
  static constexpr int kTileAt = kChannels * 4;
  static constexpr int kSharedBytes = kTileAt + kChannels * kLine * 4;
  static constexpr int kNowhere = -1;
  struct State {};

  BAP_HOST_DEVICE static int channel_tiles(const ChannelUnpackParams& p) { return ceil_div(p.channels, kChannels); }
  BAP_HOST_DEVICE static int grid_x(const ChannelUnpackParams& p) {
    return ceil_div(p.height * p.width, kPixels) * channel_tiles(p);
  }
  BAP_HOST_DEVICE static int grid_y(const ChannelUnpackParams& p) { return p.batch; }
  BAP_HOST_DEVICE static constexpr int tile_at(int channel, int pixel) {
    return kTileAt + (channel * kLine + pixel) * 4;
  }

  // For each channel of the block from `first` on: its place in the source, or kNowhere.
  template <class Block>
  BAP_DEVICE static void find_places(Block& b, const ChannelUnpackParams& p, int first, int used) {
    b.each([&](int thread, State&) {
      if (thread >= kChannels) return;
      const int channel = first + thread;
      b.template store<int>(thread, thread * 4, p.list.block == 0 && channel < used ? channel : kNowhere);
    });
    b.sync();
    if (p.list.block == 0) return;
    b.each([&](int thread, State&) {
      for (int i = thread; i < used; i += kThreads) {
        const int channel = listed_channel(p.list.entries, p.list.block, i) - first;
        if (within(channel, kChannels)) b.template store<int>(thread, channel * 4, i);
      }
    });
    b.sync();
  }

  template <class Block>
  BAP_DEVICE static void store_element(Block& b, const ChannelUnpackParams& p, int thread, scalar_t* plane, int channel,
                                       int first_pixel, int pixel, bool listed) {
    const int at = first_pixel + pixel;
    if (at >= p.height * p.width) return;
    const int h = at / p.width, w = at - h * p.width;
    plane[h * p.result_stride.h + w * p.result_stride.w] =
        listed ? b.template load<scalar_t>(thread, tile_at(channel, pixel)) : from_float<scalar_t>(0.0f);
  }

  template <class Block>
  BAP_DEVICE static void run(Block& b, const ChannelUnpackParams& p) {
    const int first_channel = b.block_x() % channel_tiles(p) * kChannels;
    const int first_pixel = b.block_x() / channel_tiles(p) * kPixels;
    const int image = b.block_y(), pixels = p.height * p.width;
    const int used = p.used != nullptr && *p.used < p.depth ? *p.used : p.depth;
    find_places(b, p, first_channel, used);
    const scalar_t* source = static_cast<const scalar_t*>(p.source) + static_cast<int64_t>(image) * pixels * p.padded;
    b.each([&](int thread, State&) {
      for (int k = thread; k < kPixels * kChannels; k += kThreads) {
        const int channel = k % kChannels, pixel = k / kChannels;
        const int place = b.template load<int>(thread, channel * 4);
        if (place == kNowhere || first_pixel + pixel >= pixels) continue;
        b.template store<scalar_t>(thread, tile_at(channel, pixel),
                                   source[static_cast<int64_t>(first_pixel + pixel) * p.padded + place]);
      }
    });
    b.sync();
    scalar_t* result = static_cast<scalar_t*>(p.result) + image * p.result_stride.n;
    b.each([&](int thread, State&) {
      const int step = p.result_vector ? kVector : 1, groups = kPixels / step;
      for (int k = thread; k < kChannels * groups; k += kThreads) {
        const int pixel = k % groups * step, channel = k / groups;
        if (first_channel + channel >= p.channels) break;
        const bool listed = b.template load<int>(thread, channel * 4) != kNowhere;
        scalar_t* plane = result + (first_channel + channel) * p.result_stride.c;
        if (!p.result_vector) {
          store_element(b, p, thread, plane, channel, first_pixel, pixel, listed);
          continue;
        }
        // Planes of whole chunks: one that begins within the plane ends there.
        if (first_pixel + pixel >= pixels) continue;
        Chunk<scalar_t> chunk;
        BAP_UNROLL
        for (int v = 0; v < kVector; ++v) {
          chunk.values[v] =
              listed ? b.template load<scalar_t>(thread, tile_at(channel, pixel + v)) : from_float<scalar_t>(0.0f);
        }
        store_chunk(plane + first_pixel + pixel, chunk);
      }
    });
  }
};

}  // namespace bap_kernels
