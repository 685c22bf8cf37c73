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
#include "backends/cpu/gradient_chunks.h"
#include "backends/cpu/native_call.h"
#include "backends/cpu/scratch.h"
#include "backends/cpu/winograd.h"

namespace bap_kernels {
namespace {

constexpr int64_t kChunkFloats = 96 * 1024;
// Fewer pixels would read the weights too often, more would leave the cache.
constexpr int64_t kFewestPixels = 192, kMostPixels = 1536;
constexpr int64_t kFewestWinogradPixels = 512;  // four times the weights
constexpr int64_t kEnoughChunks = 16, kSmallChunk = 96;

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

void run_convolution(const PhaseConvolution& k, const NativeCall& call, bool last) {
  k.winograd ? run_winograd(call, k.weight, k.winograd, last) : run_driver(call, k.weight, last);
}

NativeCall phase_call(const GradientCall& c, const InputGradient& gradient, const Phase& rows, const Phase& columns) {
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

// Restricts a convolution to `rows` rows of a chunk's images, from `first` on; `y` receives (images, rows, columns).
NativeCall chunk_call(const PhaseConvolution& k, const Chunk& chunk, int64_t first, int64_t rows, float* y,
                      int threads) {
  NativeCall n = k.call;
  n.x += chunk.first_image * n.x_stride_n * n.element_size();
  n.batch = chunk.images();
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
  const int64_t least = std::max((total + most - 1) / most, std::min(enough, total / kSmallChunk));
  std::vector<Chunk> chunks;
  if (least <= s.batch) {
    const int64_t count = std::max<int64_t>(1, least);
    for (int64_t i = 0; i < count; ++i) chunks.push_back({i * s.batch / count, (i + 1) * s.batch / count, 0, s.height});
    return chunks;
  }
  const int64_t steps = (s.height + grain - 1) / grain;
  const int64_t parts = std::min(steps, (least + s.batch - 1) / s.batch);
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t i = 0; i < parts; ++i) {
      chunks.push_back({n, n + 1, i * steps / parts * grain, std::min(s.height, (i + 1) * steps / parts * grain)});
    }
  }
  return chunks;
}

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
  return chunk.images() * (chunk.last_row - chunk.first_row) * c.shape.width;
}

// Of the convolutions of a chunk, by tiles of `size` or directly: a stride's phases share out the taps.
double convolution_cycles(const GradientCall& c, const InputGradient& gradient, const Chunk& chunk, int64_t size) {
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

// Computes a chunk with `threads` threads and takes its results to their places; `sums` receives those of x * dx.
template <class scalar_t, class bits_t>
void run_chunk(const GradientCall& c, const InputGradient& gradient, const std::vector<PhaseConvolution>& convolutions,
               const Chunk& chunk, const ChunkSink<scalar_t, bits_t>& sink, bool last, int threads, double* sums) {
  const int64_t stride = c.stride[0];
  std::vector<int64_t> offsets = {0};
  for (const PhaseConvolution& k : convolutions) {
    const int64_t pixels = chunk.images() * rows_of(k, chunk, stride) * k.columns.count;
    offsets.push_back(offsets.back() + pixels * gradient.count);
  }
  float* results = thread_scratch(Scratch::kGradientChunk, offsets.back());
  std::vector<const float*> parts;
  for (size_t k = 0; k < convolutions.size(); ++k) {
    float* part = results + offsets[k];
    parts.push_back(part);
    if (offsets[k + 1] == offsets[k]) continue;
    const int64_t rows = rows_of(convolutions[k], chunk, stride);
    const NativeCall call = chunk_call(convolutions[k], chunk, chunk.first_row / stride, rows, part, threads);
    run_convolution(convolutions[k], call, last);
  }
  serial_task([&] { return sink_cycles(c, gradient, chunk); },
              [&] { last ? sink.pixels(chunk, parts, sums) : sink.planes(chunk, parts, sums); });
}

template <class scalar_t, class bits_t>
void run_chunks(const GradientCall& c, InputGradient& gradient, const std::vector<PhaseConvolution>& convolutions,
                bool last) {
  const int64_t size = convolutions.size() == 1 ? convolutions[0].winograd : 0;
  const int threads = free_threads();
  // Chunks order the sums of x * dx, so there they depend on the shape alone.
  const int64_t enough = gradient.dots ? kEnoughChunks : std::max<int64_t>(kEnoughChunks, threads);
  const auto chunks = make_chunks(c.shape, size ? size : c.stride[0], gradient.count,
                                  size ? kFewestWinogradPixels : kFewestPixels, enough);
  const int64_t count = static_cast<int64_t>(chunks.size());
  const auto others = channels_not_in(gradient.channels, gradient.count, c.shape.channels_in);
  const bool in_place = !gradient.dots || !last || c.input.stride(1) == 1;
  const ChunkSink<scalar_t, bits_t> sink(c, gradient, convolutions, others,
                                         in_place ? c.input : c.input.contiguous(at::MemoryFormat::ChannelsLast));
  std::vector<double> dots(gradient.dots ? count * gradient.count : 0, 0.0);
  const auto run = [&](int64_t i, int chunk_threads) {
    double* sums = gradient.dots ? dots.data() + i * gradient.count : nullptr;
    run_chunk(c, gradient, convolutions, chunks[i], sink, last, chunk_threads, sums);
  };
  // With fewer chunks than threads: all threads for one after the other, each taken to its place by one of them; or a
  // thread for each. Judged by the first chunk.
  const double products = convolution_cycles(c, gradient, chunks[0], size);
  const double placing = sink_cycles(c, gradient, chunks[0]);
  const bool one_by_one =
      count < threads && static_cast<double>(count) * (products / threads + placing) < products + placing;
  if (one_by_one) {
    for (int64_t i = 0; i < count; ++i) run(i, threads);
  } else {
    const auto cycles = [&](int64_t i) {
      return convolution_cycles(c, gradient, chunks[i], size) + sink_cycles(c, gradient, chunks[i]);
    };
    parallel_tasks(count, 1, cycles, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) run(i, 1);
    });
  }
  for (int64_t i = 0; gradient.dots && i < count; ++i) {
    for (int64_t j = 0; j < gradient.count; ++j) gradient.dot[j] += dots[i * gradient.count + j];
  }
}

// One convolution for each pair of phases that some tap meets.
std::vector<PhaseConvolution> make_convolutions(const GradientCall& c, const InputGradient& gradient, bool last) {
  const auto& s = c.shape;
  const auto row_phases = make_phases(s.height, s.kernel_h, c.stride[0], c.padding[kTop], c.dilation[0]);
  const auto column_phases = make_phases(s.width, s.kernel_w, c.stride[1], c.padding[kLeft], c.dilation[1]);
  std::vector<PhaseConvolution> convolutions;
  for (size_t r = 0; r < row_phases.size(); ++r) {
    for (size_t w = 0; w < column_phases.size(); ++w) {
      const Phase &rows = row_phases[r], &columns = column_phases[w];
      if (rows.taps == 0 || columns.taps == 0 || rows.count == 0 || columns.count == 0) continue;
      PhaseConvolution k{static_cast<int64_t>(r),
                         static_cast<int64_t>(w),
                         rows,
                         columns,
                         phase_call(c, gradient, rows, columns),
                         {},
                         0};
      // A stride's phases have fewer taps.
      k.winograd = unmeasured_winograd(k.call, /*weight_is_kept=*/false);
      k.weight = k.winograd ? pack_weight_winograd(k.call, k.winograd)
                 : last     ? pack_weight_nhwc(k.call)
                            : pack_weight_nchw(k.call);
      convolutions.push_back(std::move(k));
    }
  }
  return convolutions;
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
  const std::vector<PhaseConvolution> convolutions = make_convolutions(c, gradient, last);
  const auto format = last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const bool whole = c.stride[0] == 1 && c.stride[1] == 1 && !gradient.channels && !gradient.keep && !gradient.dots;
  if (whole && gradient.store && !convolutions.empty() && gradient.grad_input.is_contiguous(format)) {
    NativeCall n = chunk_call(convolutions[0], {0, s.batch, 0, s.height}, 0, s.height,
                              static_cast<float*>(gradient.grad_input.mutable_data_ptr()), free_threads());
    n.out_bfloat16 = c.bfloat16();
    run_convolution(convolutions[0], n, last);
  } else if (c.bfloat16()) {
    run_chunks<c10::BFloat16, uint16_t>(c, gradient, convolutions, last);
  } else {
    run_chunks<float, float>(c, gradient, convolutions, last);
  }
}

}  // namespace bap_kernels
