// Working memory of a thread, kept between calls.
#pragma once

#include <cstdint>

namespace bap_kernels {

// Buffers of one thread, each named by what it holds. Two uses that are alive at once in a thread have a slot each:
// only the chunk of an input gradient is alive while another driver runs.
enum class Scratch {
  kPixelPointers,    // of tiles: channels_last drivers, weight gradient
  kPartialSums,      // of tiles between two passes of the reduction
  kPixelPanel,       // listed channels of a block's pixels
  kGradientFilters,  // weight gradient: dy by filters
  kGradientRows,     // weight gradient: image rows of listed channels
  kGradientChunk,    // input gradient: results of the convolutions of a chunk
  kDepthwiseStrip,   // rows of one channel with zeros around them
  kBandHidden,       // fused blocks: rows between the first convolution and the depthwise one
  kBandFiltered,     // fused blocks: rows between the depthwise convolution and the last one
  kWinogradPixels,   // listed channels of a block's pixels, side by side
  kWinogradValues,   // transformed pixels
  kWinogradSums,     // sums of products, for each point of a tile
  kWinogradResults,  // pixels of a panel on their way to planes
  kCount,
};

// At least `floats` floats, aligned to 64 bytes. Contents are kept until the slot is asked for again.
float* thread_scratch(Scratch slot, int64_t floats);

// At least `count` zeros, which nobody writes to.
const float* thread_zeros(int64_t count);

}  // namespace bap_kernels
