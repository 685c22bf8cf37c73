// Which source pixel and which tap of the weight a result pixel meets, for the forward and for the input's gradient.
// The host plans the axes.
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
  Divisor count;  // result places
  Divisor taps;
  int source_size, source_step, source_first, tap_step;
  int result_step, result_first;
  int weight_first, weight_step;
};

// One axis of a convolution; `before` is the padding before the first place.
struct ConvAxis {
  int input, output, kernel, stride, before, dilation;
};

inline AxisPlan forward_axis(const ConvAxis& a) {
  return {divisor_of(a.output), divisor_of(a.kernel), a.input, a.stride, -a.before, a.dilation, 1, 0, 0, 1};
}

inline int greatest_divisor(int a, int b) {
  while (b != 0) {
    const int rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

inline AxisPlan gradient_axis(const ConvAxis& a, int phase) {
  const int place = (phase + a.stride - a.before % a.stride) % a.stride;
  const int step = a.stride / greatest_divisor(a.stride, a.dilation);
  // Taps that meet the phase recur every `step`; there may be none.
  int first = 0;
  while (first < step && first * a.dilation % a.stride != phase) ++first;
  const bool meets = first < step && first < a.kernel;
  const int count = a.input > place ? ceil_div(a.input - place, a.stride) : 0;
  return {divisor_of(count),
          divisor_of(meets ? ceil_div(a.kernel - first, step) : 0),
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
BAP_HOST_DEVICE RowPlace row_place(int m, const Divisor& rows, const Divisor& columns) {
  const int line = columns.quotient(m), image = rows.quotient(line);
  return {image, rows.rest(line, image), columns.rest(m, line)};
}

BAP_HOST_DEVICE bool within(int place, int size) { return static_cast<unsigned>(place) < static_cast<unsigned>(size); }

// The steps of the sum in their order, channels in blocks outside, taps inside; and in elements, how far the step lies
// from a row's pixel at its first tap, and from a filter's start.
struct StepWalk {
  int block, tap_h, tap_w;
  int64_t source, filter;
  int64_t source_line, filter_line;  // of the first tap of this row of taps
};
// Step `number`. Strides of the source's pixels, of a filter's taps and of its blocks of channels.
BAP_HOST_DEVICE StepWalk step_at(int number, const AxisPlan& h, const AxisPlan& w, int64_t source_h, int64_t source_w,
                                 int kernel_w, int64_t filter_tap, int filter_block) {
  const RowPlace at = row_place(number, h.taps, w.taps);
  const int64_t source = at.row * h.tap_step * source_h;
  const int64_t filter = ((h.weight_first + at.row * h.weight_step) * kernel_w + w.weight_first) * filter_tap +
                         static_cast<int64_t>(at.image) * filter_block;
  return {at.image,
          at.row,
          at.column,
          source + at.column * w.tap_step * source_w,
          filter + at.column * w.weight_step * filter_tap,
          source,
          filter};
}
// Moves on; true where a new block begins.
BAP_HOST_DEVICE bool advance(StepWalk& s, const AxisPlan& h, const AxisPlan& w, int64_t source_h, int64_t source_w,
                             int kernel_w, int64_t filter_tap, int filter_block) {
  if (++s.tap_w < w.taps.count()) {
    s.source += w.tap_step * source_w;
    s.filter += w.weight_step * filter_tap;
    return false;
  }
  s.tap_w = 0;
  const bool ends = ++s.tap_h == h.taps.count();
  if (ends) {
    s.tap_h = 0;
    s.source_line = 0;
    s.filter_line =
        (h.weight_first * kernel_w + w.weight_first) * filter_tap + static_cast<int64_t>(++s.block) * filter_block;
  } else {
    s.source_line += h.tap_step * source_h;
    s.filter_line += h.weight_step * kernel_w * filter_tap;
  }
  s.source = s.source_line;
  s.filter = s.filter_line;
  return ends;
}

}  // namespace bap_kernels
