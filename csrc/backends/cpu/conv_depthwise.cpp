// Driver of depthwise convolutions, each listed channel by a filter of its own, and of poolings (see pooling.cpp).
//   y[j] = relu?(scale[j] * (conv(x[list[j]], w[list[j]]) + bias[list[j]]) + shift[j] + residual[j])
//   channels_last  tasks are rows of results x groups of channels; inputs are read where they lie, and the pixels whose
//                  filter reaches beyond the image have fewer taps, one pixel at a time
//   contiguous     tasks are strips of rows of a channel, whose inputs are copied first, with zeros around them, each
//                  phase of the stride by itself, so that neighbouring results read neighbouring inputs
// No atomics; taps are added in order, so results do not vary with the number of threads or the batch.
#include "backends/cpu/depthwise.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "backends/cpu/isa.h"
#include "backends/cpu/microkernels/depthwise.h"
#include "backends/cpu/native_call.h"
#include "backends/cpu/scratch.h"
#include "dispatch/packed_cache.h"

namespace bap_kernels {
namespace {

using micro::DepthwiseArgs;
using micro::DepthwiseTable;
using micro::DepthwiseTap;
using micro::TapOp;

// Floats of a strip's copied inputs: half of the L1 cache.
constexpr int64_t kStripFloats = 4096;
// Rows of results for each thread, from which on they alone are shared out.
constexpr int64_t kRowsPerThread = 7;

// channels_last: [channels / lanes][tap][lanes], zeros behind the last channel. Else [channel][tap].
at::Tensor pack_weight(const NativeCall& n, int64_t lanes, bool channels_last) {
  const int64_t channels = channels_last ? round_up(n.kept_out, lanes) : n.kept_out;
  at::Tensor packed = at::empty({channels * n.taps}, at::TensorOptions().dtype(at::kFloat));
  float* dst = packed.mutable_data_ptr<float>();
  std::fill_n(dst, channels * n.taps, 0.f);
  for (int64_t j = 0; j < n.kept_out; ++j) {
    for (int64_t t = 0; t < n.taps; ++t) {
      const int64_t place =
          n.channel(j) * n.w_stride_out + t / n.kernel_w * n.w_stride_h + t % n.kernel_w * n.w_stride_w;
      const float value = n.bfloat16 ? static_cast<float>(reinterpret_cast<const c10::BFloat16*>(n.w)[place])
                                     : reinterpret_cast<const float*>(n.w)[place];
      dst[channels_last ? (j / lanes * n.taps + t) * lanes + j % lanes : j * n.taps + t] = value;
    }
  }
  return packed;
}

// The first and one past the last of `taps` that meet [0, size) from `start` on.
std::pair<int64_t, int64_t> taps_inside(int64_t start, int64_t taps, int64_t dilation, int64_t size) {
  const int64_t first = start >= 0 ? 0 : ceil_div(-start, dilation);
  const int64_t last = start >= size ? 0 : (size - 1 - start) / dilation + 1;
  return {std::min(first, taps), std::max(std::min(first, taps), std::min(last, taps))};
}

class Depthwise {
 public:
  Depthwise(const NativeCall& n, TapOp op, const float* weight, bool channels_last)
      : n_(n), weight_(weight), table_(*isa_depthwise()), kernel_h_(n.taps / n.kernel_w) {
    const bool bfloat16 = n.bfloat16;
    kernel_ = (channels_last ? table_.pixels : table_.planes)[static_cast<int>(op)][bfloat16];
    if (op == TapOp::kMax) fill_ = -std::numeric_limits<float>::infinity();
    phases_ = table_.phases[bfloat16];
    if (channels_last) return;
    const int64_t row_step = row_floats(), phase_step = row_step / n.stride_w;
    for (int64_t tap = 0; tap < n.taps; ++tap) {
      const int64_t row = tap / n.kernel_w * n.dilation_h, column = tap % n.kernel_w * n.dilation_w;
      taps_.push_back({row * row_step + column % n.stride_w * phase_step + column / n.stride_w, tap});
    }
  }

  // Rows [first, last) of all images, channels [channel, end).
  void run_pixels(int64_t first, int64_t last, int64_t channel, int64_t end) const {
    // Results between these have all columns of the filter inside of the image.
    const int64_t reach = (n_.kernel_w - 1) * n_.dilation_w;
    const int64_t begin = std::clamp<int64_t>(ceil_div(n_.pad_left, n_.stride_w), 0, n_.out_w);
    const int64_t room = n_.width - 1 + n_.pad_left - reach;
    const int64_t inner = std::clamp<int64_t>(room < 0 ? 0 : room / n_.stride_w + 1, begin, n_.out_w);
    std::vector<DepthwiseTap> taps;
    for (int64_t number = first; number < last; ++number) {
      const Row row{number / n_.out_h, number % n_.out_h};
      for (int64_t ow = 0; ow < begin; ++ow) run_pixels(row, ow, 1, channel, end, taps);
      if (inner > begin) run_pixels(row, begin, inner - begin, channel, end, taps);
      for (int64_t ow = inner; ow < n_.out_w; ++ow) run_pixels(row, ow, 1, channel, end, taps);
    }
  }

  int64_t strips() const {
    const int64_t reach = (kernel_h_ - 1) * n_.dilation_h + 1;
    const int64_t rows = std::max(kernel_h_, (kStripFloats / row_floats() - reach) / n_.stride_h + 1);
    return ceil_div(n_.out_h, rows);
  }

  // One strip of channel `channel` of image `image`.
  void run_strip(int64_t image, int64_t channel, int64_t strip, int64_t strips) const {
    const int64_t first = strip * n_.out_h / strips, rows = (strip + 1) * n_.out_h / strips - first;
    const int64_t in_rows = (rows - 1) * n_.stride_h + (kernel_h_ - 1) * n_.dilation_h + 1;
    const int64_t row_step = row_floats(), phase_step = row_step / n_.stride_w;
    float* strip_inputs = thread_scratch(Scratch::kDepthwiseStrip, in_rows * row_step + table_.lanes);
    const char* plane = n_.pixel(image, 0, 0) + n_.channel(channel) * n_.x_stride_c * n_.element_size();
    // Rows above and below the image are there, but change no result.
    const int64_t top = first * n_.stride_h - n_.pad_top;
    const int64_t begin = std::clamp<int64_t>(-top, 0, in_rows), end = std::clamp(n_.height - top, begin, in_rows);
    std::fill_n(strip_inputs, begin * row_step, fill_);
    phases_({plane + (top + begin) * n_.x_stride_h * n_.element_size(), end - begin, n_.x_stride_h, n_.x_stride_w,
             n_.width, n_.pad_left, n_.stride_w, phase_step, strip_inputs + begin * row_step, row_step, phase_step,
             fill_});
    std::fill_n(strip_inputs + end * row_step, (in_rows - end) * row_step, fill_);
    const int64_t place = ((image * n_.kept_out + channel) * n_.out_h + first) * n_.out_w;
    DepthwiseArgs t = arguments(channel, place);
    t.rows = rows;
    t.lanes = n_.out_w;
    t.x = strip_inputs;
    t.x_step = n_.stride_h * row_step;
    t.taps = taps_.data();
    t.tap_count = n_.taps;
    t.weight = weight_ ? weight_ + channel * n_.taps : nullptr;
    t.out_step = t.residual_step = n_.out_w;
    kernel_(t);
  }

 private:
  struct Row {
    int64_t image, oh;
  };

  // Of a copied row, all phases: whole vectors of results, and what their last taps read.
  int64_t row_floats() const {
    const int64_t reach = (n_.kernel_w - 1) * n_.dilation_w / n_.stride_w;
    return n_.stride_w * (round_up(n_.out_w, table_.lanes) + reach);
  }

  // What is fused, from `channel` on, and the place of the result.
  DepthwiseArgs arguments(int64_t channel, int64_t place) const {
    DepthwiseArgs t{};
    t.taps_of_weight = n_.taps;
    t.scale = n_.scale.empty() ? nullptr : n_.scale.data() + channel;
    t.shift = n_.shift.empty() ? nullptr : n_.shift.data() + channel;
    t.out = n_.y + place * n_.out_size();
    t.residual = n_.residual ? n_.residual + place * n_.out_size() : nullptr;
    t.relu = n_.out_relu;
    t.out_max = n_.out_max;
    return t;
  }

  // `count` results of a row from column `ow` on, which have the same taps inside of the image.
  void run_pixels(Row row, int64_t ow, int64_t count, int64_t channel, int64_t end,
                  std::vector<DepthwiseTap>& taps) const {
    const int64_t top = row.oh * n_.stride_h - n_.pad_top, left = ow * n_.stride_w - n_.pad_left;
    const auto [first_h, last_h] = taps_inside(top, kernel_h_, n_.dilation_h, n_.height);
    const auto [first_w, last_w] = taps_inside(left, n_.kernel_w, n_.dilation_w, n_.width);
    taps.clear();
    for (int64_t kh = first_h; kh < last_h; ++kh) {
      for (int64_t kw = first_w; kw < last_w; ++kw) {
        taps.push_back({(top + kh * n_.dilation_h) * n_.x_stride_h + (left + kw * n_.dilation_w) * n_.x_stride_w,
                        kh * n_.kernel_w + kw});
      }
    }
    const int64_t pixel = (row.image * n_.out_h + row.oh) * n_.out_w + ow;
    DepthwiseArgs t = arguments(channel, pixel * n_.kept_out + channel);
    if (n_.residual) t.residual = n_.residual + pixel * n_.residual_pixel + channel * n_.out_size();
    t.rows = count;
    t.lanes = end - channel;
    t.x = n_.pixel(row.image, 0, 0) + channel * n_.element_size();
    t.x_step = n_.stride_w * n_.x_stride_w;
    t.taps = taps.data();
    t.tap_count = static_cast<int64_t>(taps.size());
    t.weight = weight_ ? weight_ + channel * n_.taps : nullptr;
    t.out_step = n_.kept_out;
    t.residual_step = n_.residual_pixel / n_.out_size();
    kernel_(t);
  }

  const NativeCall& n_;
  const float* weight_;  // null: there is none
  float fill_ = 0;       // of a strip's surroundings
  const DepthwiseTable& table_;
  int64_t kernel_h_;
  void (*kernel_)(const DepthwiseArgs&);
  void (*phases_)(const micro::DepthwisePhases&);
  std::vector<DepthwiseTap> taps_;  // of copied strips
};

NativeTasks pixel_tasks(const NativeCall& n, const Depthwise& depthwise) {
  const int64_t lines = n.batch * n.out_h, lanes = isa_depthwise()->lanes;
  const int64_t vectors = ceil_div(n.kept_out, lanes);
  const int64_t groups = lines < kRowsPerThread * n.threads ? std::min<int64_t>(n.threads, vectors) : 1;
  const int64_t blocks = std::min<int64_t>(lines, groups > 1 ? 1 : n.threads);
  return {blocks * groups, [=, &n, &depthwise](int64_t task) {
            const int64_t block = task / groups, group = task % groups;
            depthwise.run_pixels(block * lines / blocks, (block + 1) * lines / blocks, group * vectors / groups * lanes,
                                 std::min(n.kept_out, (group + 1) * vectors / groups * lanes));
          }};
}

NativeTasks plane_tasks(const NativeCall& n, const Depthwise& depthwise) {
  const int64_t strips = depthwise.strips(), all = n.batch * n.kept_out * strips;
  const int64_t count = std::min<int64_t>(all, n.threads);
  return {count, [=, &n, &depthwise](int64_t task) {
            for (int64_t i = task * all / count; i < (task + 1) * all / count; ++i) {
              const int64_t plane = i / strips;
              depthwise.run_strip(plane / n.kept_out, plane % n.kept_out, i % strips, strips);
            }
          }};
}

}  // namespace

int depthwise_threads(const NativeCall& n) { return threads_for(n.pixels() * n.kept_out * n.taps); }

void run_depthwise(const NativeCall& n, TapOp op, const float* weight, bool channels_last) {
  const Depthwise depthwise(n, op, weight, channels_last);
  run_tasks(channels_last ? pixel_tasks(n, depthwise) : plane_tasks(n, depthwise));
}

std::string depthwise_unsupported_reason(const ConvCall& c) {
  if (c.fusion.has_prologue()) return "no native kernel for depthwise convolutions behind an input transform";
  if (c.format() == at::MemoryFormat::ChannelsLast && (has_value(c.in_index) || c.input.stride(1) != 1)) {
    return "no native kernel for depthwise convolutions of some channels of a channels_last input";
  }
  return "";
}

RangeRun depthwise_rows(const NativeCall& n, const float* weight) {
  const auto depthwise = std::make_shared<Depthwise>(n, TapOp::kFilter, weight, /*channels_last=*/true);
  return [=, &n](int64_t begin, int64_t end) { depthwise->run_pixels(begin, end, 0, n.kept_out); };
}

at::Tensor packed_depthwise_weight(const ConvCall& c, const NativeCall& n) {
  const bool last = c.format() == at::MemoryFormat::ChannelsLast;
  const int64_t lanes = isa_depthwise()->lanes;
  return PackedCache::instance().get(c, PackedKind::kDepthwise, static_cast<int>(lanes * 2 + (last ? 1 : 0)),
                                     [&] { return pack_weight(n, lanes, last); });
}

at::Tensor depthwise_gathered_conv2d(const ConvCall& c) {
  at::Tensor result;
  NativeCall n = prepare_native(c, result);
  n.threads = depthwise_threads(n);
  const at::Tensor weight = packed_depthwise_weight(c, n);
  run_depthwise(n, TapOp::kFilter, weight.const_data_ptr<float>(), c.format() == at::MemoryFormat::ChannelsLast);
  return result;
}

}  // namespace bap_kernels
