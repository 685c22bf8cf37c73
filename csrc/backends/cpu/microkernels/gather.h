// Copies the listed channels of channels_last pixels side by side, by permutations of whole vectors where the
// instruction set has them. No torch header, as in tile.h.
#pragma once

#include <cstdint>

namespace bap_kernels::micro {

constexpr int kGatherBytes = 64;  // of the widest vector: 32 channels of bfloat16, 16 of float

// One load of a vector of a pixel's channels, and where they go in one vector of listed channels.
struct GatherStep {
  alignas(kGatherBytes) unsigned char places[kGatherBytes];  // in the load, an index of the element's size in each lane
  int32_t begin;                                             // first channel of the load
  uint32_t lanes;                                            // of the result, that come from this load
  // In the first step of each result:
  int32_t steps;
  uint32_t stored;  // lanes that are stored
};

// out[p * out_step + i] = in[p * in_step + list[i]], times scale[i], plus shift[i], and at least 0 with the ReLU.
// Steps are in elements. Nothing behind a pixel's `channels` is read.
struct ChannelGather {
  int64_t pixels;
  const void* in;
  int64_t in_step;
  void* out;
  int64_t out_step;
  int64_t channels, listed;
  const GatherStep* steps;  // of all results, in order
  bool has_prologue;
  const float* scale;  // null: 1
  const float* shift;  // null: 0
  bool relu;
};

// For pixels of at least eight channels; without a prologue.
void gather_floats_avx2(const ChannelGather& gather);
void gather_floats_avx512(const ChannelGather& gather);
// bfloat16, with AVX512_BF16; behind an odd number of listed channels follows a zero.
void gather_pairs_avx512bf16(const ChannelGather& gather);

}  // namespace bap_kernels::micro
