// Interface between the native driver and the microkernels, which are compiled once per instruction set.
// No torch header and no std container: an inline function compiled here for AVX-512 must never be the copy that the
// linker keeps for everyone.
#pragma once

#include <cstdint>

namespace bap_kernels::micro {

// A run of the reduction: `count` channel units of one tap, starting at `begin` in the channel table.
struct Segment {
  int32_t tap, begin, count;
};

// A run of `tiles` output tiles, each `rows` x (`vectors` * lanes) accumulators. The two kernels share everything but
// the roles:
//   conv_nhwc  rows are output pixels, lanes are output channels (channels_last results)
//   conv_nchw  rows are output channels, lanes are output pixels (contiguous results)
// Every pointer moves by its step from one tile to the next; steps and strides are in the pointer's own elements, those
// of out and residual in bytes.
struct TileArgs {
  int32_t tiles;
  const float* weight;  // packed panel at the first reduction step
  int64_t weight_step;

  // conv_nhwc: source[tap * row_stride + r] is the start of pixel r's channels; offsets[c] is unit c's place in it.
  const float* const* source;
  int64_t source_step;
  int32_t row_stride;
  const int32_t* offsets;
  const Segment* segments;
  int32_t segment_count;
  // Memory that will soon be wanted, or null: each step asks for the line at `ahead`, which moves on as the weight
  // does, from tile to tile.
  const char* ahead;
  bool out_near;  // the result's lines have been asked for
  // conv_nchw: panel[k * panel_stride + lane], `depth` steps.
  const float* panel;
  int64_t panel_stride;
  int64_t depth;

  float* partial;  // rows x (vectors * lanes) sums, contiguous, between blocks of the reduction
  int64_t partial_step;
  bool load_partial;   // start from `partial` instead of zero
  bool store_partial;  // leave the sums in `partial`; nothing of what follows is used

  const float* scale;  // null: 1. Per output channel, padded to whole tiles.
  const float* shift;  // null: 0
  int64_t channel_step;
  char* out;             // first row in the result
  const char* residual;  // null: none
  int64_t out_step, out_row_stride, residual_step, residual_row_stride;
  int32_t valid;  // lanes of a row that exist in the result, 1 .. vectors * lanes
  bool relu;
  float out_min, out_max;  // the smallest result of a ReLU, always 0, and the largest
  bool bfloat16;           // element type of out and residual; else float
};

using TileKernel = void (*)(const TileArgs&);

constexpr int kMaxRows = 14;
constexpr int kMaxVectors = 2;

// What one instruction set offers. kernel[rows - 1][vectors - 1]; null beyond `rows`.
struct KernelTable {
  int rows, lanes;  // largest tile: rows x (kMaxVectors * lanes)
  TileKernel conv_nhwc[kMaxRows][kMaxVectors];
  TileKernel conv_nchw[kMaxRows][kMaxVectors];
};

// Null where the compiler could not build the instruction set. The *_pairs tables multiply pairs of bfloat16 held in
// one 32-bit lane. The *_emulated tables hold the tiles of AVX-512 and NEON in AVX2 code, so that every x86 machine can
// test what surrounds them.
const KernelTable* table_neon();
const KernelTable* table_avx2();
const KernelTable* table_avx512();
const KernelTable* table_avx512_pairs();
const KernelTable* table_neon_emulated();
const KernelTable* table_avx512_emulated();
const KernelTable* table_avx512_emulated_pairs();

}  // namespace bap_kernels::micro
