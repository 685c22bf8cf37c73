// Input gradient: the forward's kernels with the roles swapped.
//   dx[n, c, ih, iw] = sum over live j, kh, kw of dy[n, j, oh, ow] * w[filter j, c, kh, kw],
//                      for the taps with oh * stride_h + kh * dilation_h - pad_top = ih, and so for columns
// A stride splits the input's rows and columns into phases; in one phase the same taps meet every pixel, which makes it
// a convolution of stride 1 over dy, with flipped taps, and no product with a zero between pixels.
// The pixels are taken in chunks whose results stay in the cache. From there each chunk goes, in one pass, to its
// place in dx, with zeros beside it, and into the sums of x * dx: a gradient of full width is never stored for these.
// Chunks depend on the shape alone and their sums are added in order, so results do not vary with threads or runs.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <numeric>

#include "backends/cpu/gradient_call.h"
#include "backends/cpu/isa.h"
#include "backends/cpu/microkernels/gradient_rows.h"
#include "backends/cpu/native_call.h"
#include "backends/cpu/winograd.h"

namespace bap_kernels {
namespace {

constexpr int kChunkSlot = 3;
constexpr int64_t kChunkFloats = 96 * 1024;
// Fewer pixels would read the weights too often, more would leave the cache.
constexpr int64_t kFewestPixels = 192, kMostPixels = 1536;
constexpr int64_t kFewestWinogradPixels = 512;  // four times the weights
constexpr int64_t kEnoughChunks = 16, kSmallChunk = 96;

// The rows (or columns) `phase`, `phase` + stride, ... of the input, and the taps that meet them, first to last:
// tap first_tap - t * tap_step reads row i + t * dilation - pad of dy for the i-th of these rows.
struct Phase {
  int64_t first_tap, tap_step, taps, dilation, pad, count;
};

std::vector<Phase> make_phases(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  std::vector<Phase> phases;
  const int64_t common = std::gcd(stride, dilation);
  for (int64_t phase = 0; phase < stride; ++phase) {
    Phase p{0, stride / common, 0, dilation / common, 0, std::max<int64_t>(0, (size - phase + stride - 1) / stride)};
    for (int64_t tap = 0; tap < kernel; ++tap) {
      if ((phase + pad - tap * dilation) % stride != 0) continue;
      ++p.taps;
      p.first_tap = tap;
      p.pad = -(phase + pad - tap * dilation) / stride;
    }
    if (p.taps <= 1) p.dilation = 1;
    phases.push_back(p);
  }
  return phases;
}

struct Class {
  int64_t row_phase, column_phase;
  Phase rows, columns;
  NativeCall call;
  at::Tensor weight;
  int64_t winograd;  // edge of its tiles; 0: a direct convolution
};

void run_class(const Class& k, const NativeCall& call, bool last) {
  k.winograd ? run_winograd(call, k.weight, k.winograd, last) : run_driver(call, k.weight, last);
}

struct Chunk {
  int64_t first_image, last_image, first_row, last_row;  // rows of the input
};

NativeCall class_call(const GradientCall& c, const InputGradient& gradient, const Phase& rows, const Phase& columns) {
  NativeCall n = native_source(c.grad_output, c.live_count(), {rows.taps, columns.taps});
  n.dilation_h = rows.dilation;
  n.dilation_w = columns.dilation;
  n.pad_top = rows.pad;
  n.pad_left = columns.pad;
  n.out_h = rows.count;
  n.out_w = columns.count;
  n.kept_out = gradient.count;
  n.in_index = c.all_live ? nullptr : c.live.data();
  n.out_index = gradient.channels;
  n.w_stride_out = c.weight.stride(1);
  n.w_stride_in = c.weight.stride(0);
  n.w_stride_h = -rows.tap_step * c.weight.stride(2);
  n.w_stride_w = -columns.tap_step * c.weight.stride(3);
  n.w = static_cast<const char*>(c.weight.const_data_ptr()) +
        (rows.first_tap * c.weight.stride(2) + columns.first_tap * c.weight.stride(3)) * n.element_size();
  n.weight_index = c.all_live ? c.out_index : c.live_filters.data();
  return n;
}

// Restricts a class to a chunk; `y` receives (images, rows, columns) of it.
NativeCall chunk_call(const Class& k, const Chunk& chunk, int64_t first, int64_t rows, float* y, int threads) {
  NativeCall n = k.call;
  n.x += chunk.first_image * n.x_stride_n * n.element_size();
  n.batch = chunk.last_image - chunk.first_image;
  n.pad_top -= first;
  n.out_h = rows;
  n.y = reinterpret_cast<char*>(y);
  n.threads = threads;
  join_rows(n);
  return n;
}

// Chunks of about equal size: enough of them to share out, none so small that the weights dominate.
std::vector<Chunk> make_chunks(const ConvShape<int64_t>& s, int64_t grain, int64_t channels, int64_t fewest,
                               int64_t enough) {
  const int64_t most = std::clamp(kChunkFloats / channels, fewest, kMostPixels), area = s.height * s.width;
  const int64_t total = s.batch * area;
  const int64_t wanted = std::max((total + most - 1) / most, std::min(enough, total / kSmallChunk));
  std::vector<Chunk> chunks;
  if (wanted <= s.batch) {
    const int64_t count = std::max<int64_t>(1, wanted);
    for (int64_t i = 0; i < count; ++i) chunks.push_back({i * s.batch / count, (i + 1) * s.batch / count, 0, s.height});
    return chunks;
  }
  const int64_t steps = (s.height + grain - 1) / grain;
  const int64_t parts = std::min(steps, (wanted + s.batch - 1) / s.batch);
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t i = 0; i < parts; ++i) {
      chunks.push_back({n, n + 1, i * steps / parts * grain, std::min(s.height, (i + 1) * steps / parts * grain)});
    }
  }
  return chunks;
}

// Takes the results of a chunk's classes to dx and into the sums.
template <class scalar_t, class bits_t>
class ChunkSink {
 public:
  ChunkSink(const GradientCall& c, const InputGradient& gradient, const std::vector<Class>& classes,
            const std::vector<int32_t>& others, const at::Tensor& input)
      : c_(c), gradient_(gradient), classes_(classes), others_(others), input_(input) {
    x_ = reinterpret_cast<const bits_t*>(input.const_data_ptr<scalar_t>());
    dx_ = gradient.store ? reinterpret_cast<bits_t*>(gradient.grad_input.mutable_data_ptr<scalar_t>()) : nullptr;
  }

  // parts[k]: the result of class k; dots: one sum for each computed channel.
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
          const int64_t k = class_of(h % c_.stride[0], w % c_.stride[1]);
          if (k < 0) {
            if (dx) std::fill_n(dx, s.channels_in, bits_t{0});
            continue;
          }
          const Class& one = classes_[k];
          const int64_t first = chunk.first_row / c_.stride[0];
          const int64_t row = (n - chunk.first_image) * rows_of(one, chunk) + h / c_.stride[0] - first;
          const float* part = parts[k] + (row * one.columns.count + w / c_.stride[1]) * count;
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
        if (dx_ && (!kept || static_cast<int64_t>(classes_.size()) < c_.stride[0] * c_.stride[1])) {
          clear_rows(n, channel, chunk);
        }
        for (size_t k = 0; k < classes_.size(); ++k) {
          const Class& one = classes_[k];
          const bool paired = pairs_with_next(k);
          const float* odd = paired ? parts[k + 1] : nullptr;
          const double sum = plane(chunk, n, i, channel, one, parts[k], odd, kept);
          if (gradient_.dots) dots[i] += sum;
          if (paired) ++k;
        }
      }
    }
  }

 private:
  int64_t class_of(int64_t row_phase, int64_t column_phase) const {
    for (size_t k = 0; k < classes_.size(); ++k) {
      if (classes_[k].row_phase == row_phase && classes_[k].column_phase == column_phase) return k;
    }
    return -1;
  }

  int64_t rows_of(const Class& k, const Chunk& chunk) const {
    const int64_t stride = c_.stride[0], first = chunk.first_row / stride;
    return std::min(k.rows.count, (chunk.last_row + stride - 1 - k.row_phase) / stride) - first;
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

  // Whether the next class has the odd columns of the same rows, neighbours in memory of this one's.
  bool pairs_with_next(size_t k) const {
    const bool neighbours = input_.stride(3) == 1 && (!dx_ || gradient_.grad_input.stride(3) == 1);
    return c_.stride[1] == 2 && neighbours && classes_[k].column_phase == 0 && k + 1 < classes_.size() &&
           classes_[k + 1].row_phase == classes_[k].row_phase;
  }

  // One class's pixels of one channel, those of `odd` between them: to dx, and the sum of their products with x.
  double plane(const Chunk& chunk, int64_t n, int64_t i, int64_t channel, const Class& k, const float* part,
               const float* odd, bool kept) const {
    int64_t rows = rows_of(k, chunk), columns = k.columns.count;
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
  const std::vector<Class>& classes_;
  const std::vector<int32_t>& others_;  // channels that are not computed
  const at::Tensor input_;
  const bits_t* x_;
  bits_t* dx_;
};

std::vector<int32_t> channels_not_in(const int32_t* list, int64_t count, int64_t channels) {
  std::vector<bool> listed(channels, list == nullptr);
  for (int64_t i = 0; list && i < count; ++i) listed[list[i]] = true;
  std::vector<int32_t> others;
  for (int64_t c = 0; c < channels; ++c) {
    if (!listed[c]) others.push_back(static_cast<int32_t>(c));
  }
  return others;
}

int64_t pixels_of(const GradientCall& c, const Chunk& chunk) {
  return (chunk.last_image - chunk.first_image) * (chunk.last_row - chunk.first_row) * c.shape.width;
}

// Of the convolutions of a chunk, by tiles of `size` or directly: a stride's phases share out the taps.
double class_cycles(const GradientCall& c, const InputGradient& gradient, const Chunk& chunk, int64_t size) {
  const int64_t pixels = pixels_of(c, chunk), live = c.live_count();
  if (size > 0) {
    const int64_t numbers = ceil_div(pixels, size * size) * (size + 2) * (size + 2);
    return direct_cycles(numbers, gradient.count, live) + pass_cycles(numbers * (2 * live + gradient.count));
  }
  return direct_cycles(pixels, gradient.count, live * c.taps()) / static_cast<double>(c.stride[0] * c.stride[1]);
}

double sink_cycles(const GradientCall& c, const InputGradient& gradient, const Chunk& chunk) {
  const int64_t channels = (gradient.store ? c.shape.channels_in : 0) + (gradient.dots ? gradient.count : 0);
  return pass_cycles(pixels_of(c, chunk) * (gradient.count + channels));
}

template <class scalar_t, class bits_t>
void run_chunks(const GradientCall& c, InputGradient& gradient, const std::vector<Class>& classes, bool last) {
  const int64_t size = classes.size() == 1 ? classes[0].winograd : 0;
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  // Chunks order the sums of x * dx, so there they depend on the shape alone.
  const int64_t enough = gradient.dots ? kEnoughChunks : std::max<int64_t>(kEnoughChunks, threads);
  const auto chunks = make_chunks(c.shape, size ? size : c.stride[0], gradient.count,
                                  size ? kFewestWinogradPixels : kFewestPixels, enough);
  const auto others = channels_not_in(gradient.channels, gradient.count, c.shape.channels_in);
  const bool in_place = !gradient.dots || !last || c.input.stride(1) == 1;
  const ChunkSink<scalar_t, bits_t> sink(c, gradient, classes, others,
                                         in_place ? c.input : c.input.contiguous(at::MemoryFormat::ChannelsLast));
  std::vector<double> dots(gradient.dots ? chunks.size() * gradient.count : 0, 0.0);
  const auto run = [&](int64_t number, int threads) {
    const Chunk& chunk = chunks[number];
    const int64_t stride = c.stride[0], first = chunk.first_row / stride;
    std::vector<int64_t> place = {0};
    for (const Class& k : classes) {
      const int64_t rows = std::min(k.rows.count, (chunk.last_row + stride - 1 - k.row_phase) / stride) - first;
      place.push_back(place.back() + (chunk.last_image - chunk.first_image) * rows * k.columns.count * gradient.count);
    }
    float* scratch = thread_scratch(kChunkSlot, place.back());
    std::vector<const float*> parts;
    for (size_t k = 0; k < classes.size(); ++k) {
      parts.push_back(scratch + place[k]);
      if (place[k + 1] == place[k]) continue;
      const int64_t rows = (place[k + 1] - place[k]) / (chunk.last_image - chunk.first_image) /
                           (classes[k].columns.count * gradient.count);
      run_class(classes[k], chunk_call(classes[k], chunk, first, rows, scratch + place[k], threads), last);
    }
    double* sums = gradient.dots ? dots.data() + number * gradient.count : nullptr;
    serial_task([&] { return sink_cycles(c, gradient, chunk); },
                [&] { last ? sink.pixels(chunk, parts, sums) : sink.planes(chunk, parts, sums); });
  };
  const int64_t count = static_cast<int64_t>(chunks.size());
  // With fewer chunks than threads: all threads for one after the other, each taken to its place by one of them; or a
  // thread for each. Of the chunks' convolutions and of what follows, by the first one.
  const double products = class_cycles(c, gradient, chunks[0], size), sink_of_one = sink_cycles(c, gradient, chunks[0]);
  const bool together =
      count < threads && static_cast<double>(count) * (products / threads + sink_of_one) < products + sink_of_one;
  if (together) {
    for (int64_t i = 0; i < count; ++i) run(i, threads);
  } else {
    const auto cycles = [&](int64_t i) {
      return class_cycles(c, gradient, chunks[i], size) + sink_cycles(c, gradient, chunks[i]);
    };
    parallel_tasks(count, 1, cycles, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) run(i, 1);
    });
  }
  for (int64_t i = 0; gradient.dots && i < count; ++i) {
    for (int64_t j = 0; j < gradient.count; ++j) gradient.dot[j] += dots[i * gradient.count + j];
  }
}

}  // namespace

void run_input_gradient(const GradientCall& c, InputGradient& gradient) {
  const auto& s = c.shape;
  gradient.dot.assign(gradient.dots ? gradient.count : 0, 0.0);
  if (c.live_count() == 0 || gradient.count == 0 || c.input.numel() == 0) {
    if (gradient.store) gradient.grad_input = at::zeros_like(c.input);
    return;
  }
  if (gradient.store) gradient.grad_input = at::empty_like(c.input);
  const at::Tensor& layout = gradient.store ? gradient.grad_input : c.input;
  const bool last = layout.stride(1) == 1 && s.channels_in > 1;
  const auto row_phases = make_phases(s.height, s.kernel_h, c.stride[0], c.padding[kTop], c.dilation[0]);
  const auto column_phases = make_phases(s.width, s.kernel_w, c.stride[1], c.padding[kLeft], c.dilation[1]);
  std::vector<Class> classes;
  for (size_t r = 0; r < row_phases.size(); ++r) {
    for (size_t w = 0; w < column_phases.size(); ++w) {
      const Phase &rows = row_phases[r], &columns = column_phases[w];
      if (rows.taps == 0 || columns.taps == 0 || rows.count == 0 || columns.count == 0) continue;
      Class k{static_cast<int64_t>(r),
              static_cast<int64_t>(w),
              rows,
              columns,
              class_call(c, gradient, rows, columns),
              {},
              0};
      // A stride's phases have fewer taps.
      k.winograd = unmeasured_winograd(k.call, /*weight_is_kept=*/false);
      k.weight = k.winograd ? pack_weight_winograd(k.call, k.winograd)
                 : last     ? pack_weight_nhwc(k.call)
                            : pack_weight_nchw(k.call);
      classes.push_back(std::move(k));
    }
  }
  const auto format = last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const bool whole = c.stride[0] == 1 && c.stride[1] == 1 && !gradient.channels && !gradient.keep && !gradient.dots;
  if (whole && gradient.store && !classes.empty() && gradient.grad_input.is_contiguous(format)) {
    const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    NativeCall n = chunk_call(classes[0], {0, s.batch, 0, s.height}, 0, s.height,
                              static_cast<float*>(gradient.grad_input.mutable_data_ptr()), threads);
    n.out_bfloat16 = c.bfloat16();
    run_class(classes[0], n, last);
  } else if (c.bfloat16()) {
    run_chunks<c10::BFloat16, uint16_t>(c, gradient, classes, last);
  } else {
    run_chunks<float, float>(c, gradient, classes, last);
  }
}

}  // namespace bap_kernels
