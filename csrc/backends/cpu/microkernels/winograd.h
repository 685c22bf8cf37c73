// Interface between the Winograd driver (conv_winograd.cpp) and its microkernels, compiled once per instruction set.
// No torch header and no std container, as in tile.h.
//
// F(m x m, 3 x 3) with m = 4 or 2; a tile reads (m + 2) x (m + 2) pixels, its points, and writes m x m. `width` is
// 2 * lanes, or `lanes` in a last panel that needs no more.
//   weight  [panel][point][channel][width]              transformed filters
//   values  [point][channel / lanes][tile][lanes]       transformed pixels of the listed channels
//   sums    [tile][point][2 * lanes]                    their products, of one panel
// The gradient of the weight takes the same steps backwards: the gradients of m x m results to points, for each point
// the products of all channels and filters summed over tiles, and those sums to 3 x 3 taps.
#pragma once

#include <cstdint>

namespace bap_kernels::micro {

// values[point * point_step + channel / lanes * channel_step + tile * lanes + channel % lanes] for all tiles and
// `channels`, which is a multiple of `lanes`.
struct WinogradInput {
  int64_t tiles, channels;
  const float* const* pixels;  // [tile][point]: the first of the pixel's channels
  float* values;
  int64_t point_step, channel_step;
};

// sums[r * sum_step + lane] = sum over `channels` of values(channel, r) * weight[channel][lane]
struct WinogradProduct {
  const float* values;  // of the first row's tile
  int64_t channel_step;
  const float* weight;
  int64_t channels;
  float* sums;
  int64_t sum_step;
  // Memory that will soon be wanted: for each channel it asks for a line, each time `ahead_step` floats further on.
  const float* ahead;
  int64_t ahead_step;
};

// y = relu?(scale * result + shift + residual), at most out_max behind a ReLU, at the tile's pixels inside the image.
struct WinogradOutput {
  int64_t tiles;
  const float* sums;
  const int64_t* places;            // [tile][pixel]: its number; negative: outside the image
  float* out;                       // the panel's first channel of pixel 0
  const float* residual;            // null: none
  int64_t out_step, residual_step;  // from pixel to pixel
  const float* scale;               // of the panel's first channel, padded to whole panels; null: 1
  const float* shift;               // null: 0
  int64_t valid;                    // channels of the panel
  bool relu;
  float out_max;
};

// x = relu?(scale * x + shift) of `pixels` rows of `channels` values, a multiple of `lanes`; in place.
struct WinogradPrologue {
  int64_t pixels, channels;
  float* values;
  const float* scale;  // null: 1
  const float* shift;  // null: 0
  bool relu;
};

// One of the moves that gather a pixel's listed channels, `lanes` of them into each vector: of the input's channels
// `from`, counted from chunk * lanes on, to the lanes `to`.
struct GatherMove {
  int32_t chunk;
  uint16_t from, to;
  bool last;  // of its vector
};

// Listed channels of `pixels` pixels side by side: out[p * out_step + i] = in[p * in_step + list[i]].
struct PixelGather {
  int64_t pixels, channels;
  const float* in;
  int64_t in_step;
  const int32_t* list;
  const GatherMove* moves;  // in the order of vectors; used where the table says so
  int64_t move_count;
  float* out;  // up to a whole vector behind each pixel's last channel is overwritten, with anything
  int64_t out_step;
};

// `lanes` filters of one input channel: weight[point * point_step + lane] from taps[tap * lanes + lane].
struct WinogradWeight {
  const float* taps;
  float* weight;
  int64_t point_step;
};

// sums[r * vectors * lanes + lane] = sum over tiles of values(channel r, tile) * gradients(lane, tile), added to what
// is there; `vectors` is that of the kernel.
struct WinogradOuter {
  int64_t tiles;
  const float* values;     // of the first row's channel, the rows' within one vector of channels
  const float* gradients;  // of the first vector of filters
  int64_t gradient_step;   // from vector to vector
  float* sums;
  bool add;  // to what is there; else to zero
};

// The taps of `lanes` filters: taps[tap * lanes + lane] from sums[point * point_step + lane].
struct WinogradTaps {
  const float* sums;
  int64_t point_step;
  float* taps;
};

constexpr int kMostProductRows = 14, kMostOuterVectors = 6;

// Of one size of tile.
struct WinogradTransforms {
  int size;  // m
  void (*input)(const WinogradInput&);
  void (*output[2])(const WinogradOutput&);  // [vectors - 1]
  void (*weight)(const WinogradWeight&);
  void (*gradient)(const WinogradInput&);  // of m x m pixels for each tile
  void (*taps)(const WinogradTaps&);
};

struct WinogradTable {
  int rows, lanes;                                               // largest product: rows x (2 * lanes)
  void (*product[kMostProductRows][2])(const WinogradProduct&);  // [rows - 1][vectors - 1]
  int outer_rows, outer_vectors;                                 // largest outer product
  void (*outer[kMostOuterVectors])(const WinogradOuter&);        // [vectors - 1]
  void (*prologue)(const WinogradPrologue&);
  void (*gather)(const PixelGather&);
  bool gather_moves;                 // whether it reads `moves`
  WinogradTransforms transforms[2];  // m = 4, m = 2
};

const WinogradTable* winograd_avx2();
const WinogradTable* winograd_avx512();
const WinogradTable* winograd_emulated();
const WinogradTable* winograd_neon();
const WinogradTable* winograd_neon_emulated();

}  // namespace bap_kernels::micro
