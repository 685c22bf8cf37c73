// Which source pixel and which tap of the weight a result pixel meets, for the forward and for the input's gradient.
//
// Both are one sum: result place r of an axis meets, at its tap t,
//   source place   r * source_step + source_first + t * tap_step       and is stored at   r * result_step +
//   result_first weight's tap   weight_first + t * weight_step
// Forward: source = input, one phase. Gradient: source = the result's gradient; the pixels of one phase,
// (place + padding) mod stride, meet the same taps, in turn one source place lower:
//   dx[h] = sum over t of g[(h + padding - t * dilation) / stride] * w[t], where the division comes out even
#pragma once

#include "backends/cuda/kernels/host_device.h"

namespace bap_kernels {

struct AxisPlan {
  int count;  // result places
  int taps;
  int source_size, source_step, source_first, tap_step;
  int result_step, result_first;
  int weight_first, weight_step;
};

// One axis of a convolution; `before` is the padding before the first place.
struct ConvAxis {
  int input, output, kernel, stride, before, dilation;
};

BAP_HOST_DEVICE AxisPlan forward_axis(const ConvAxis& a) {
  return {a.output, a.kernel, a.input, a.stride, -a.before, a.dilation, 1, 0, 0, 1};
}

BAP_HOST_DEVICE int greatest_divisor(int a, int b) {
  while (b != 0) {
    const int rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

BAP_HOST_DEVICE AxisPlan gradient_axis(const ConvAxis& a, int phase) {
  const int place = (phase + a.stride - a.before % a.stride) % a.stride;
  const int step = a.stride / greatest_divisor(a.stride, a.dilation);
  // Taps that meet the phase recur every `step`; there may be none.
  int first = 0;
  while (first < step && first * a.dilation % a.stride != phase) ++first;
  const bool meets = first < step && first < a.kernel;
  const int count = a.input > place ? ceil_div(a.input - place, a.stride) : 0;
  return {count,
          meets ? ceil_div(a.kernel - first, step) : 0,
          a.output,
          1,
          meets ? (place + a.before - first * a.dilation) / a.stride : 0,
          -(step * a.dilation / a.stride),
          a.stride,
          place,
          first,
          step};
}

// Where a row of the implicit matrix lies among `rows` x `columns` result places of each image.
struct RowPlace {
  int image, row, column;
};
BAP_HOST_DEVICE RowPlace row_place(int m, int rows, int columns) {
  const auto line = static_cast<unsigned>(m) / static_cast<unsigned>(columns);
  const auto image = line / static_cast<unsigned>(rows);
  return {static_cast<int>(image), static_cast<int>(line - image * static_cast<unsigned>(rows)),
          static_cast<int>(static_cast<unsigned>(m) - line * static_cast<unsigned>(columns))};
}

BAP_HOST_DEVICE bool within(int place, int size) { return static_cast<unsigned>(place) < static_cast<unsigned>(size); }

// The channel at place k of a list: `block` 0: all channels, no list; else entries of `block` neighbouring channels, of
// which each starts at a multiple of `block`. A list of single channels has block 1.
BAP_HOST_DEVICE int listed_channel(const int32_t* entries, int block, int k) {
  if (block == 0) return k;
  if (block == 1) return entries[k];
  return entries[k / block] * block + k % block;
}

// The steps of the sum in their order: channels in blocks outside, taps inside.
struct StepCursor {
  int block, tap_h, tap_w;
};
// Moves on; true where a new block of channels begins.
BAP_HOST_DEVICE bool advance(StepCursor& c, int taps_h, int taps_w) {
  if (++c.tap_w < taps_w) return false;
  c.tap_w = 0;
  if (++c.tap_h < taps_h) return false;
  c.tap_h = 0;
  ++c.block;
  return true;
}

}  // namespace bap_kernels
