// What the native backward can run, and which channels of the output gradient are zero throughout.
#include "cpu/gradient_call.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>

#include "cpu/choice.h"
#include "cpu/isa.h"

namespace bap_kernels {
namespace {

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

// Where channels lie side by side, one pass over the pixels serves all of those still in question.
template <class bits_t>
std::vector<bool> zero_channels_of_pixels(const at::Tensor& t) {
  constexpr bits_t kMagnitude = static_cast<bits_t>(~bits_t{0}) >> 1;
  std::vector<int32_t> left;
  for (int64_t c = 0; c < t.size(1); ++c) left.push_back(static_cast<int32_t>(c));
  const auto* data = static_cast<const bits_t*>(t.const_data_ptr());
  for (int64_t n = 0; n < t.size(0) && !left.empty(); ++n) {
    for (int64_t h = 0; h < t.size(2) && !left.empty(); ++h) {
      for (int64_t w = 0; w < t.size(3) && !left.empty(); ++w) {
        const auto* pixel = data + n * t.stride(0) + h * t.stride(2) + w * t.stride(3);
        size_t kept = 0;
        for (const int32_t c : left) {
          left[kept] = c;
          kept += (pixel[c] & kMagnitude) == 0;
        }
        left.resize(kept);
      }
    }
  }
  std::vector<bool> zero(t.size(1), false);
  for (const int32_t c : left) zero[c] = true;
  return zero;
}

template <class bits_t>
std::vector<bool> zero_channels(const at::Tensor& t) {
  if (t.stride(1) == 1 && t.size(1) > 1) return zero_channels_of_pixels<bits_t>(t);
  std::vector<bool> zero(t.size(1));
  for (int64_t c = 0; c < t.size(1); ++c) zero[c] = channel_is_zero<bits_t>(t, c);
  return zero;
}

}  // namespace

std::string native_gradient_why_not(const at::Tensor& input, const ConvShape<int64_t>& s) {
  const auto dtype = input.scalar_type();
  if (isa() == "none") return backend_why_not("native");
  if (dtype != at::kFloat && dtype != at::kBFloat16) {
    return std::string("no native kernel for ") + c10::toString(dtype) + " (float32 and bfloat16 only)";
  }
  if (s.depthwise) return "no native kernel for depthwise convolutions";
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max() / 4;
  const int64_t taps = s.kernel_h * s.kernel_w;
  if (s.kept_in * taps > kLargest / 1024 || s.kept_out * taps > kLargest / 1024 || s.channels_in > kLargest ||
      s.batch * s.out_h * s.out_w > kLargest || s.batch * s.height * s.width > kLargest) {
    return "the shape is beyond 32-bit tile arithmetic";
  }
  return "";
}

void find_live_channels(GradientCall& c) {
  const at::Tensor& dy = c.grad_output;
  const std::vector<bool> zero = c.bfloat16() ? zero_channels<uint16_t>(dy) : zero_channels<uint32_t>(dy);
  c.all_live = std::find(zero.begin(), zero.end(), true) == zero.end();
  if (c.all_live) return;
  for (int64_t j = 0; j < c.shape.kept_out; ++j) {
    if (zero[j]) continue;
    c.live.push_back(static_cast<int32_t>(j));
    c.live_filters.push_back(static_cast<int32_t>(c.out_index ? c.out_index[j] : j));
  }
}

}  // namespace bap_kernels
