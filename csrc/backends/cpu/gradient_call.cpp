// What the native backward can run, and which channels of the output gradient are zero throughout.
#include "backends/cpu/gradient_call.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <mutex>

#include "backends/cpu/isa.h"
#include "backends/cpu/native.h"
#include "backends/cpu/read_channels.h"

namespace bap_kernels {
namespace {

constexpr int64_t kRowsAtFirst = 4, kRowsPerTask = 32, kChannelsPerTask = 8;

// Sign apart, a zero of either type is all bits clear.
template <class bits_t>
bool all_zero(const bits_t* p, int64_t count, int64_t step) {
  constexpr bits_t kMagnitude = static_cast<bits_t>(~bits_t{0}) >> 1;
  bits_t seen = 0;
  for (int64_t i = 0; i < count; ++i) seen |= p[i * step];
  return (seen & kMagnitude) == 0;
}

// Rows of one channel, first to last, until one is not zero.
template <class bits_t>
bool channel_is_zero(const at::Tensor& t, int64_t channel) {
  const auto* data = static_cast<const bits_t*>(t.const_data_ptr()) + channel * t.stride(1);
  for (int64_t n = 0; n < t.size(0); ++n) {
    for (int64_t h = 0; h < t.size(2); ++h) {
      if (!all_zero(data + n * t.stride(0) + h * t.stride(2), t.size(3), t.stride(3))) return false;
    }
  }
  return true;
}

// Where channels lie side by side: few pixels tell that most channels are not zero; if any are left, one pass over all
// pixels collects the bits of every channel.
template <class bits_t>
std::vector<bool> zero_channels_of_pixels(const at::Tensor& t) {
  const int64_t channels = t.size(1), rows = t.size(0) * t.size(2);
  const auto* data = static_cast<const bits_t*>(t.const_data_ptr());
  std::vector<bits_t> seen(channels, 0);
  const auto collect = [&](int64_t row, std::vector<bits_t>& bits) {
    const auto* pixel = data + row / t.size(2) * t.stride(0) + row % t.size(2) * t.stride(2);
    for (int64_t w = 0; w < t.size(3); ++w, pixel += t.stride(3)) {
      for (int64_t c = 0; c < channels; ++c) bits[c] |= pixel[c];
    }
  };
  const auto is_zero = [](bits_t bits) { return (bits & static_cast<bits_t>(~bits_t{0}) >> 1) == 0; };
  const auto some_zero = [&] { return std::any_of(seen.begin(), seen.end(), is_zero); };
  int64_t row = 0;
  for (; row < std::min(rows, kRowsAtFirst) && some_zero(); ++row) collect(row, seen);
  if (some_zero()) {
    std::mutex mutex;
    at::parallel_for(row, rows, kRowsPerTask, [&](int64_t first, int64_t last) {
      std::vector<bits_t> bits(channels, 0);
      for (int64_t r = first; r < last; ++r) collect(r, bits);
      const std::lock_guard<std::mutex> lock(mutex);
      for (int64_t c = 0; c < channels; ++c) seen[c] |= bits[c];
    });
  }
  std::vector<bool> zero(channels);
  std::transform(seen.begin(), seen.end(), zero.begin(), is_zero);
  return zero;
}

template <class bits_t>
std::vector<bool> zero_channels(const at::Tensor& t) {
  if (t.stride(1) == 1 && t.size(1) > 1) return zero_channels_of_pixels<bits_t>(t);
  std::vector<char> zero(t.size(1));  // not bool: threads write neighbours
  at::parallel_for(0, t.size(1), kChannelsPerTask, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) zero[c] = channel_is_zero<bits_t>(t, c);
  });
  return {zero.begin(), zero.end()};
}

}  // namespace

std::string native_backward_unsupported_reason(const at::Tensor& input, const ConvShape<int64_t>& s) {
  const auto dtype = input.scalar_type();
  if (isa() == "none") return kNoInstructions;
  if (dtype != at::kFloat && dtype != at::kBFloat16) {
    return std::string("no native kernel for ") + c10::toString(dtype) + " (float32 and bfloat16 only)";
  }
  if (s.depthwise) return "no native kernel for gradients of depthwise convolutions";
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max() / 4;
  const int64_t taps = s.kernel_h * s.kernel_w;
  if (s.kept_in * taps > kLargest / 1024 || s.kept_out * taps > kLargest / 1024 || s.channels_in > kLargest ||
      s.batch * s.out_h * s.out_w > kLargest || s.batch * s.height * s.width > kLargest) {
    return "the shape is beyond 32-bit tile arithmetic";
  }
  return "";
}

void find_live_channels(GradientCall& c, const OptionalTensor& read, int64_t reader) {
  const at::Tensor& dy = c.grad_output;
  const auto search = [&] { return c.bfloat16() ? zero_channels<uint16_t>(dy) : zero_channels<uint32_t>(dy); };
  const std::vector<bool> zero = has_value(read) ? unread_channels(*read, reader, search) : search();
  c.all_live = std::find(zero.begin(), zero.end(), true) == zero.end();
  if (c.all_live) return;
  for (int64_t j = 0; j < c.shape.kept_out; ++j) {
    if (zero[j]) continue;
    c.live.push_back(static_cast<int32_t>(j));
    c.live_filters.push_back(static_cast<int32_t>(c.out_index ? c.out_index[j] : j));
  }
}

}  // namespace bap_kernels
