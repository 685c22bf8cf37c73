// Driver of fused blocks: see conv_bands.h. Tasks are runs of the result's rows, through the batch. A task computes one
// band of rows after the other:
//   first      the hidden rows that the band's filters reach and that the band before has not left behind
//   depthwise  the band's rows of them
//   last       the results
// No atomics; tasks compute the rows where they meet twice, so results do not vary with the number of threads.
#include "backends/cpu/conv_bands.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "backends/cpu/depthwise.h"
#include "backends/cpu/native.h"
#include "backends/cpu/native_call.h"
#include "backends/cpu/scratch.h"

namespace bap_kernels {
namespace {

// Bytes of a band's hidden rows: half of an L2 cache of 512 KiB is left for weights, input and results.
constexpr int64_t kBandBytes = 160 * 1024;
// Of hidden tensors, smaller ones having little to gain, and of the weights of both 1x1 convolutions, which each band
// reads anew.
struct Limits {
  int64_t fewest_hidden_bytes, most_weight_bytes;
};
constexpr Limits kRule{32 * 1024, 256 * 1024}, kPromise{32 * 1024, 1024 * 1024};
// The rule wants so many rows in a task for each row that two tasks compute.
constexpr int64_t kFewestRows = 4;

bool within(const BlockCalls& calls, const Limits& limits) {
  const auto& s = calls.depthwise.shape;
  const int64_t hidden = s.batch * s.channels_in * s.height * s.width;
  const int64_t weights = calls.first.shape.kept_in * s.channels_in + s.kept_out * calls.last.shape.kept_out;
  return 4 * hidden >= limits.fewest_hidden_bytes && 4 * weights <= limits.most_weight_bytes;
}

bool is_pointwise(const ConvCall& c) {
  return c.taps() == 1 && c.stride[0] == 1 && c.stride[1] == 1 && c.symmetric_padding() && c.padding[kTop] == 0 &&
         c.padding[kLeft] == 0;
}

// The source or result of a call whose pixels lie in a buffer from `first_pixel` on.
char* moved(float* buffer, int64_t first_pixel, int64_t channels) {
  return reinterpret_cast<char*>(buffer - first_pixel * channels);
}

class Bands {
 public:
  Bands(const NativeCall& first, const NativeCall& depthwise, const NativeCall& last, const float* const* weights)
      : calls_{first, depthwise, last},
        first_(conv_nhwc_pixels(calls_[0], weights[0])),
        depthwise_(depthwise_rows(calls_[1], weights[1])),
        last_(conv_nhwc_pixels(calls_[2], weights[2])) {}
  Bands(const Bands&) = delete;
  Bands& operator=(const Bands&) = delete;

  // Rows of the result, counted through the batch.
  void run(int64_t begin, int64_t end) {
    const NativeCall& d = calls_[1];
    while (begin < end) {
      const int64_t image = begin / d.out_h, stop = std::min(end, (image + 1) * d.out_h);
      run_image(image, begin - image * d.out_h, stop - image * d.out_h);
      begin = stop;
    }
  }

 private:
  void run_image(int64_t image, int64_t begin, int64_t end) {
    auto& [first, d, last] = calls_;
    const int64_t reach = (d.taps / d.kernel_w - 1) * d.dilation_h + 1, row = d.width * d.channels_in;
    const int64_t most = std::max<int64_t>(1, (kBandBytes / (4 * row) - reach) / d.stride_h + 1);
    const int64_t rows = ceil_div(end - begin, ceil_div(end - begin, most));
    float* hidden = thread_scratch(Scratch::kBandHidden, ((rows - 1) * d.stride_h + reach) * row);
    float* filtered = thread_scratch(Scratch::kBandFiltered, rows * d.out_w * d.kept_out);
    int64_t held = 0, held_end = 0;  // hidden rows in the buffer
    for (int64_t oh = begin; oh < end; oh += rows) {
      const int64_t count = std::min(rows, end - oh), top = oh * d.stride_h - d.pad_top;
      const int64_t lowest = std::clamp<int64_t>(top + (count - 1) * d.stride_h + reach, 0, d.height);
      const int64_t highest = std::clamp<int64_t>(top, 0, lowest);
      const int64_t known = std::clamp(held_end, highest, lowest);
      if (known > highest) std::memmove(hidden, hidden + (highest - held) * row, (known - highest) * row * 4);
      held = highest, held_end = lowest;
      const int64_t above = image * d.height, pixel = (image * d.out_h + oh) * d.out_w;
      d.x = first.y = moved(hidden, (above + highest) * d.width, d.channels_in);
      last.x = d.y = moved(filtered, pixel, d.kept_out);
      first_((above + known) * d.width, (above + lowest) * d.width);
      depthwise_(image * d.out_h + oh, image * d.out_h + oh + count);
      last_(pixel, pixel + count * d.out_w);
    }
  }

  std::array<NativeCall, 3> calls_;
  RangeRun first_, depthwise_, last_;
};

}  // namespace

bool bands_cover(const BlockCalls& calls) {
  for (const ConvCall* c : {&calls.first, &calls.depthwise, &calls.last}) {
    if (c->trivial()) return false;
    if (c->input.scalar_type() != at::kFloat || c->format() != at::MemoryFormat::ChannelsLast) return false;
    if (has_value(c->dual_store_index) || !native_unsupported_reason(*c).empty()) return false;
  }
  const auto& s = calls.depthwise.shape;
  if (!s.depthwise || has_value(calls.depthwise.fusion.residual)) return false;
  return is_pointwise(calls.first) && is_pointwise(calls.last);
}

bool bands_expected(const BlockCalls& calls) {
  const auto& s = calls.depthwise.shape;
  const int64_t rows = s.batch * s.out_h, tasks = std::min<int64_t>(rows, at::get_num_threads());
  const int64_t reach = (s.kernel_h - 1) * calls.depthwise.dilation[0] + 1;
  const int64_t twice = std::max<int64_t>(0, reach - calls.depthwise.stride[0]);
  return within(calls, kRule) && (tasks == 1 || rows >= kFewestRows * twice * tasks);
}

bool bands_promise(const BlockCalls& calls) { return within(calls, kPromise); }

at::Tensor conv_bands(const BlockCalls& calls) {
  at::Tensor hidden = calls.depthwise.input, filtered = calls.last.input, result;
  const NativeCall first = prepare_native(calls.first, hidden), depthwise = prepare_native(calls.depthwise, filtered);
  const NativeCall last = prepare_native(calls.last, result);
  const at::Tensor packed[] = {packed_weight(calls.first, first), packed_depthwise_weight(calls.depthwise, depthwise),
                               packed_weight(calls.last, last)};
  const float* weights[] = {packed[0].const_data_ptr<float>(), packed[1].const_data_ptr<float>(),
                            packed[2].const_data_ptr<float>()};
  const int64_t rows = depthwise.batch * depthwise.out_h;
  const int64_t tasks = std::min<int64_t>(rows, std::max({first.threads, depthwise.threads, last.threads}));
  const auto cycles = [&](int64_t) {
    const double all = direct_cycles(first.pixels(), first.kept_out, first.depth) +
                       pass_cycles(depthwise.pixels() * depthwise.kept_out * depthwise.taps) +
                       direct_cycles(last.pixels(), last.kept_out, last.depth);
    return all / static_cast<double>(tasks);
  };
  const auto run = [&](int64_t task) {
    Bands(first, depthwise, last, weights).run(task * rows / tasks, (task + 1) * rows / tasks);
  };
  run_tasks({tasks, run, cycles});
  return result;
}

}  // namespace bap_kernels
