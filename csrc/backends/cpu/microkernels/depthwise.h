// Interface between the driver of depthwise convolutions (conv_depthwise.cpp) and its microkernels, compiled once per
// instruction set. No torch header and no std container, as in tile.h.
#pragma once

#include <cstdint>

namespace bap_kernels::micro {

// What becomes of a channel's inputs at the taps.
enum class TapOp {
  kFilter,  // the sum of their products with a weight: a convolution
  kMax,     // the largest, NaN where one is NaN: a pooling, without a weight
  kSum,     // the sum: likewise
};
constexpr int kTapOps = 3;

// One tap: where its inputs lie, counted from those of the first tap, and its number in the packed weight.
struct DepthwiseTap {
  int64_t offset;
  int64_t number;
};

// `rows` rows of `lanes` results. The two kernels share everything but the roles:
//   pixels  rows are output pixels of one row, lanes are channels (channels_last results); the weight is
//           [channels / vector][tap][vector], and scale and shift are vectors
//   planes  rows are rows of one channel, lanes are output pixels (contiguous results); the weight is [tap], and scale
//           and shift are numbers
// y[r][lane] = relu?(scale * (sum over taps of weight * x[r * x_step + tap.offset + lane]) + shift + residual), or the
// largest or the sum of these x.
// Nothing past the last lane of the last row is touched, nor between rows.
struct DepthwiseArgs {
  int64_t rows, lanes;
  const void* x;  // float, or of `pixels` bfloat16
  int64_t x_step;
  const DepthwiseTap* taps;
  int64_t tap_count;
  const float* weight;
  int64_t taps_of_weight;  // of the whole filter
  const float* scale;      // null: 1
  const float* shift;      // null: 0
  void* out;               // float or bfloat16
  const void* residual;    // of the same type; null: none
  int64_t out_step, residual_step;
  bool relu;
  float out_max;  // after the ReLU
};

// Rows of a plane, padded, and each phase of a stride by itself:
//   out[row * row_step + phase * phase_step + i] = in[row * in_row_step + (i * stride + phase - pad) * in_step],
// or `fill` outside of [0, width), for i < length, at most `phase_step`. Up to a whole vector behind each phase is
// overwritten, with anything.
struct DepthwisePhases {
  const void* in;
  int64_t rows, in_row_step, in_step, width, pad, stride, length;
  float* out;
  int64_t row_step, phase_step;
  float fill;
};

struct DepthwiseTable {
  int lanes;
  // [TapOp][bfloat16]
  void (*pixels[kTapOps][2])(const DepthwiseArgs&);
  void (*planes[kTapOps][2])(const DepthwiseArgs&);
  // [bfloat16]
  void (*phases[2])(const DepthwisePhases&);
};

const DepthwiseTable* depthwise_avx2();
const DepthwiseTable* depthwise_avx512();
const DepthwiseTable* depthwise_emulated();
const DepthwiseTable* depthwise_neon();
const DepthwiseTable* depthwise_neon_emulated();

}  // namespace bap_kernels::micro
