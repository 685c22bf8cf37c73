// Chunks of an input gradient, and how their results get to dx and into the sums of x * dx; see input_gradient.cpp.
#pragma once

#include <algorithm>
#include <vector>

#include "backends/cpu/gradient_call.h"
#include "backends/cpu/microkernels/gradient_rows.h"
#include "backends/cpu/native_call.h"

namespace bap_kernels {

// The rows (or columns) `phase`, `phase` + stride, ... of the input, and the taps that meet them, first to last:
// tap first_tap - t * tap_step reads row i + t * dilation - pad of dy for the i-th of these rows.
struct Phase {
  int64_t first_tap, tap_step, taps, dilation, pad, count;
};

// The convolution of stride 1 that computes the pixels of one phase of the rows and one of the columns.
struct PhaseConvolution {
  int64_t row_phase, column_phase;
  Phase rows, columns;
  NativeCall call;
  at::Tensor weight;
  int64_t winograd;  // edge of its tiles; 0: a direct convolution
};

struct Chunk {
  int64_t first_image, last_image, first_row, last_row;  // rows of the input

  int64_t images() const { return last_image - first_image; }
};

// Rows of a convolution's result that lie in a chunk, per image.
inline int64_t rows_of(const PhaseConvolution& k, const Chunk& chunk, int64_t stride) {
  const int64_t first = chunk.first_row / stride;
  return std::min(k.rows.count, (chunk.last_row + stride - 1 - k.row_phase) / stride) - first;
}

// Takes the results of a chunk's convolutions to dx and into the sums.
template <class scalar_t, class bits_t>
class ChunkSink {
 public:
  ChunkSink(const GradientCall& c, const InputGradient& gradient, const std::vector<PhaseConvolution>& convolutions,
            const std::vector<int32_t>& others, const at::Tensor& input)
      : c_(c), gradient_(gradient), convolutions_(convolutions), others_(others), input_(input) {
    x_ = reinterpret_cast<const bits_t*>(input.const_data_ptr<scalar_t>());
    dx_ = gradient.store ? reinterpret_cast<bits_t*>(gradient.grad_input.mutable_data_ptr<scalar_t>()) : nullptr;
  }

  // parts[k]: the result of convolution k; dots: one sum for each computed channel.
  void pixels(const Chunk& chunk, const std::vector<const float*>& parts, double* dots) const {
    const auto& s = c_.shape;
    const int64_t count = gradient_.count, dx_h = dx_ ? gradient_.grad_input.stride(2) : 0;
    std::vector<float> sums(gradient_.dots ? count : 0, 0.f);
    for (int64_t n = chunk.first_image; n < chunk.last_image; ++n) {
      for (int64_t h = chunk.first_row; h < chunk.last_row; ++h) {
        for (int64_t w = 0; w < s.width; ++w) {
          const bits_t* x = x_ + n * input_.stride(0) + h * input_.stride(2) + w * input_.stride(3);
          bits_t* dx =
              dx_ ? dx_ + n * gradient_.grad_input.stride(0) + h * dx_h + w * gradient_.grad_input.stride(3) : nullptr;
          const int64_t k = convolution_of(h % c_.stride[0], w % c_.stride[1]);
          if (k < 0) {
            if (dx) std::fill_n(dx, s.channels_in, bits_t{0});
            continue;
          }
          const PhaseConvolution& convolution = convolutions_[k];
          const int64_t first = chunk.first_row / c_.stride[0];
          const int64_t rows = rows_of(convolution, chunk, c_.stride[0]);
          const int64_t row = (n - chunk.first_image) * rows + h / c_.stride[0] - first;
          const float* part = parts[k] + (row * convolution.columns.count + w / c_.stride[1]) * count;
          float* sum = gradient_.dots ? sums.data() : nullptr;
          if (gradient_.channels) {
            listed_pixel(part, x, dx, sum);
          } else {
            micro::gradient_pixel(part, x, dx, gradient_.keep, sum, count);
          }
        }
      }
    }
    for (size_t i = 0; i < sums.size(); ++i) dots[i] = sums[i];
  }

  void planes(const Chunk& chunk, const std::vector<const float*>& parts, double* dots) const {
    for (int64_t n = chunk.first_image; n < chunk.last_image; ++n) {
      if (dx_) {
        for (const int32_t channel : others_) clear_rows(n, channel, chunk);
      }
      for (int64_t i = 0; i < gradient_.count; ++i) {
        const int64_t channel = gradient_.channels ? gradient_.channels[i] : i;
        const bool kept = gradient_.keep == nullptr || gradient_.keep[i] != 0;
        if (dx_ && (!kept || static_cast<int64_t>(convolutions_.size()) < c_.stride[0] * c_.stride[1])) {
          clear_rows(n, channel, chunk);
        }
        for (size_t k = 0; k < convolutions_.size(); ++k) {
          const bool paired = pairs_with_next(k);
          const float* odd = paired ? parts[k + 1] : nullptr;
          const double sum = plane(chunk, n, i, channel, convolutions_[k], parts[k], odd, kept);
          if (gradient_.dots) dots[i] += sum;
          if (paired) ++k;
        }
      }
    }
  }

 private:
  int64_t convolution_of(int64_t row_phase, int64_t column_phase) const {
    for (size_t k = 0; k < convolutions_.size(); ++k) {
      if (convolutions_[k].row_phase == row_phase && convolutions_[k].column_phase == column_phase) return k;
    }
    return -1;
  }

  void listed_pixel(const float* part, const bits_t* x, bits_t* dx, float* sum) const {
    if (dx) std::fill_n(dx, c_.shape.channels_in, bits_t{0});
    for (int64_t i = 0; i < gradient_.count; ++i) {
      const int32_t channel = gradient_.channels[i];
      if (dx) reinterpret_cast<scalar_t*>(dx)[channel] = static_cast<scalar_t>(part[i]);
      if (sum) sum[i] += part[i] * static_cast<float>(reinterpret_cast<const scalar_t*>(x)[channel]);
    }
  }

  void clear_rows(int64_t n, int64_t channel, const Chunk& chunk) const {
    const auto& g = gradient_.grad_input;
    for (int64_t h = chunk.first_row; h < chunk.last_row; ++h) {
      bits_t* row = dx_ + n * g.stride(0) + channel * g.stride(1) + h * g.stride(2);
      if (g.stride(3) == 1) {
        std::fill_n(row, c_.shape.width, bits_t{0});
      } else {
        for (int64_t w = 0; w < c_.shape.width; ++w) row[w * g.stride(3)] = 0;
      }
    }
  }

  // Whether the next convolution has the odd columns of the same rows, neighbours in memory of this one's.
  bool pairs_with_next(size_t k) const {
    const bool neighbours = input_.stride(3) == 1 && (!dx_ || gradient_.grad_input.stride(3) == 1);
    return c_.stride[1] == 2 && neighbours && convolutions_[k].column_phase == 0 && k + 1 < convolutions_.size() &&
           convolutions_[k + 1].row_phase == convolutions_[k].row_phase;
  }

  // One convolution's pixels of one channel, those of `odd` between them: to dx, and the sum of their products with x.
  double plane(const Chunk& chunk, int64_t n, int64_t i, int64_t channel, const PhaseConvolution& k, const float* part,
               const float* odd, bool kept) const {
    int64_t rows = rows_of(k, chunk, c_.stride[0]), columns = k.columns.count;
    const int64_t h = chunk.first_row + k.row_phase, place = (n - chunk.first_image) * gradient_.count + i;
    const int64_t odd_columns = odd ? c_.shape.width - columns : 0;
    part += place * rows * columns;
    if (odd) odd += place * rows * odd_columns;
    const bits_t* x = nullptr;
    bits_t* dx = nullptr;
    int64_t x_h = 0, x_w = 0, dx_h = 0, dx_w = 0;
    if (gradient_.dots) {
      x_h = input_.stride(2) * c_.stride[0], x_w = input_.stride(3) * c_.stride[1];
      x = x_ + n * input_.stride(0) + channel * input_.stride(1) + h * input_.stride(2) +
          k.column_phase * input_.stride(3);
    }
    if (dx_ && kept) {
      const auto& g = gradient_.grad_input;
      dx_h = g.stride(2) * c_.stride[0], dx_w = g.stride(3) * c_.stride[1];
      dx = dx_ + n * g.stride(0) + channel * g.stride(1) + h * g.stride(2) + k.column_phase * g.stride(3);
    }
    const bool whole =
        c_.stride[0] == 1 && c_.stride[1] == 1 && (!x || x_h == columns * x_w) && (!dx || dx_h == columns * dx_w);
    if (whole) columns *= rows, rows = 1;
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const bits_t* x_row = x ? x + r * x_h : nullptr;
      bits_t* dx_row = dx ? dx + r * dx_h : nullptr;
      sum += odd ? micro::gradient_pairs(part + r * columns, odd + r * odd_columns, x_row, dx_row, columns, odd_columns)
                 : micro::gradient_run(part + r * columns, x_row, x_w, dx_row, dx_w, columns);
    }
    return sum;
  }

  const GradientCall& c_;
  const InputGradient& gradient_;
  const std::vector<PhaseConvolution>& convolutions_;
  const std::vector<int32_t>& others_;  // channels that are not computed
  const at::Tensor input_;
  const bits_t* x_;
  bits_t* dx_;
};

}  // namespace bap_kernels
