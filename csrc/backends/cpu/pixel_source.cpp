// Pointers into x, or into rows packed for a block of output pixels.
#include "backends/cpu/pixel_source.h"

#include <algorithm>
#include <cstring>

#include "backends/cpu/scratch.h"

namespace bap_kernels {
namespace {

// With fewer results per pixel, copying its channels costs more than the shorter loops save.
constexpr int64_t kPackedFrom = 32;
// Taps of fewer channels make loops so short that rows which need no gather are copied in any case.
constexpr int64_t kFewChannels = 16;
// Pixels at a multiple of this distance share the sets of the L1 cache: a tile of 14 has too many for its ways.
constexpr int64_t kSetBytes = 4096;
// Whole loads for each vector of listed channels: with more, plain loops are faster.
constexpr int64_t kMostLoads = 3;

const int32_t* counting(int64_t count) {
  thread_local std::vector<int32_t> numbers;
  while (static_cast<int64_t>(numbers.size()) < count) numbers.push_back(static_cast<int32_t>(numbers.size()));
  return numbers.data();
}

}  // namespace

PixelAccess::PixelAccess(const NativeCall& n) {
  // All channels of bfloat16, an even number of them, lie in pairs already.
  const bool paired = !n.in_index && n.kept_in % 2 == 0 && reinterpret_cast<uintptr_t>(n.x) % 4 == 0 &&
                      (n.x_stride_n | n.x_stride_h | n.x_stride_w) % 2 == 0;
  const bool readable = n.pairs ? paired : !n.bfloat16;
  const bool in_place = readable && !n.has_prologue && n.x_stride_c == 1;
  const bool mergeable = n.taps > 1 && n.dilation_w == 1;
  ChannelGatherKernel by_vectors = isa_gather(n.pairs);
  // Direct convolutions gain nothing by whole loads.
  if (by_vectors.whole_loads) by_vectors = {};
  const bool crowded = n.taps == 1 && n.x_stride_w * n.element_size() % kSetBytes == 0 && by_vectors;
  gapless = in_place && !n.in_index && !n.bfloat16 && n.x_stride_w == n.units;
  const bool copied = n.kept_out >= kPackedFrom || (gapless && n.units < kFewChannels && mergeable);
  direct = in_place && !((mergeable || crowded) && copied);
  merged = !direct && mergeable;
  runs = merged ? n.taps / n.kernel_w : n.taps;
  steps = merged ? n.kernel_w * n.units : n.units;
  pixel_floats = n.units;
  if (!direct && n.taps == 1 && n.units * int64_t{4} % (kSetBytes / 4) == 0) pixel_floats += 16;
  if (!direct && n.x_stride_c == 1 && n.pairs == n.bfloat16 && by_vectors) {
    gather_steps =
        plan_gather([&](int64_t i) { return n.channel(i); }, n.kept_in, n.channels_in, by_vectors, n.element_size());
    if (!gather_steps.empty()) gather = by_vectors;
  }
}

std::vector<micro::GatherStep> plan_gather(const std::function<int64_t(int64_t)>& listed, int64_t count,
                                           int64_t channels, const ChannelGatherKernel& kernel, int64_t size) {
  std::vector<micro::GatherStep> steps;
  const int64_t lanes = kernel.lanes;
  if (!kernel || (kernel.whole_loads && channels < lanes)) return steps;
  steps.reserve((count + channels) / lanes + 2);
  for (int64_t first = 0; first < count; first += lanes) {
    const size_t own = steps.size();
    const int64_t last = std::min(count, first + lanes);
    int64_t chunk = -1;
    for (int64_t i = first; i < last; ++i) {
      const int64_t channel = listed(i);
      if (channel / lanes != chunk) {
        chunk = channel / lanes;
        steps.emplace_back();
        steps.back().begin = static_cast<int32_t>(std::max<int64_t>(0, std::min(chunk * lanes, channels - lanes)));
      }
      micro::GatherStep& step = steps.back();
      step.lanes |= 1u << (i - first);
      step.places[(i - first) * size] = static_cast<unsigned char>(channel - step.begin);
    }
    const int64_t stored = size == 2 ? (last - first + 1) / 2 * 2 : last - first;
    steps[own].steps = static_cast<int32_t>(steps.size() - own);
    steps[own].stored = static_cast<uint32_t>((uint64_t{1} << stored) - 1);
  }
  const bool slow = kernel.whole_loads && static_cast<int64_t>(steps.size()) > kMostLoads * ceil_div(count, lanes);
  return slow ? std::vector<micro::GatherStep>() : steps;
}

PixelSource::PixelSource(const NativeCall& n, const PixelAccess& access) : n_(n), access_(access) {
  const bool inside = n.taps == 1 && n.pad_top == 0 && n.pad_left == 0 && n.stride_w == 1 && n.stride_h == 1 &&
                      n.out_h == n.height && n.out_w == n.width;
  const bool rows = n.out_h == 1 || n.x_stride_h == n.width * n.x_stride_w;
  const bool images = n.batch == 1 || n.x_stride_n == n.height * n.width * n.x_stride_w;
  if (inside && rows && images) stream_step_ = n.x_stride_w * n.element_size();
}

const int32_t* PixelSource::offsets() const {
  return access_.direct && n_.in_index ? n_.in_index : counting(access_.steps);
}

void PixelSource::pointers(int64_t begin, int64_t end, int64_t rows, const float** table) {
  zeros_ = thread_zeros(access_.direct ? n_.channels_in : access_.steps);
  if (!access_.direct) n_.taps == 1 ? pack_pixels(begin, end) : pack_rows(begin, end);
  if (stream_step_) {
    const char* first = access_.direct ? stream(begin) : reinterpret_cast<const char*>(panel_);
    const int64_t step = access_.direct ? stream_step_ : access_.pixel_floats * int64_t{4};
    for (int64_t p = 0; p < end - begin; ++p) table[p] = reinterpret_cast<const float*>(first + p * step);
    return;
  }
  const int64_t area = n_.out_h * n_.out_w;
  int64_t image = begin / area, oh = begin % area / n_.out_w, ow = begin % n_.out_w;
  for (int64_t tile = begin; tile < end; tile += rows, table += access_.runs * rows) {
    const int64_t last = std::min(rows, end - tile);
    for (int64_t r = 0; r < last;) {
      const int64_t count = std::min(last - r, n_.out_w - ow);  // pixels of one row of the result
      for (int64_t run = 0; run < access_.runs; ++run) {
        const float** pointer = table + run * rows + r;
        if (access_.merged) {
          const float* first = run_pointer(image, oh, ow, 0, run);
          const int64_t step = first == zeros_ ? 0 : n_.stride_w * n_.units;
          for (int64_t i = 0; i < count; ++i) pointer[i] = first + i * step;
        } else {
          for (int64_t i = 0; i < count; ++i) pointer[i] = run_pointer(image, oh, ow + i, tile - begin + r + i, run);
        }
      }
      r += count;
      ow += count;
      if (ow == n_.out_w) {
        ow = 0;
        if (++oh == n_.out_h) oh = 0, ++image;
      }
    }
  }
}

const float* PixelSource::run_pointer(int64_t image, int64_t oh, int64_t ow, int64_t local, int64_t run) const {
  const bool single = n_.taps == 1;
  const int64_t kh = single || access_.merged ? run : run / n_.kernel_w;
  const int64_t kw = single || access_.merged ? 0 : run % n_.kernel_w;
  const int64_t ih = oh * n_.stride_h - n_.pad_top + kh * n_.dilation_h;
  const int64_t column = ow * n_.stride_w + kw * n_.dilation_w;  // counted from the left padding's first
  const int64_t iw = column - n_.pad_left;
  if (ih < 0 || ih >= n_.height) return zeros_;
  if (single || access_.direct) {
    if (iw < 0 || iw >= n_.width) return zeros_;
    if (access_.direct) return reinterpret_cast<const float*>(n_.pixel(image, ih, iw));
    return panel_ + local * access_.pixel_floats;
  }
  const Rows& r = rows_[image - first_image_];
  return panel_ + ((r.offset + ih - r.first) * columns_ + column) * n_.units;
}

void PixelSource::prefetch(const float* const* tile, int64_t first, int64_t last) const {
  if (!access_.direct || n_.taps != 1) return;
  for (int64_t r = first; r < last; ++r) {
    for (int64_t c = 0; c < n_.channels_in; c += 16) __builtin_prefetch(tile[r] + c);
  }
}

// One pixel of input for each output pixel: a 1x1 convolution of any stride.
void PixelSource::pack_pixels(int64_t begin, int64_t end) {
  const int64_t area = n_.out_h * n_.out_w;
  panel_ = thread_scratch(Scratch::kPixelPanel, (end - begin) * access_.pixel_floats);
  for (int64_t p = begin; p < end;) {
    const int64_t ow = p % n_.out_w, count = std::min(n_.out_w - ow, end - p);
    const int64_t ih = p % area / n_.out_w * n_.stride_h - n_.pad_top, iw = ow * n_.stride_w - n_.pad_left;
    // The run's pixels inside the image: [low, high).
    const int64_t low = iw >= 0 ? 0 : (-iw + n_.stride_w - 1) / n_.stride_w;
    const int64_t high = iw >= n_.width ? 0 : std::min(count, (n_.width - 1 - iw) / n_.stride_w + 1);
    if (ih >= 0 && ih < n_.height && low < high) {
      pack_run(n_.pixel(p / area, ih, iw + low * n_.stride_w), n_.stride_w, high - low,
               panel_ + (p - begin + low) * access_.pixel_floats);
    }
    p += count;
  }
}

// The image rows that the block's output rows read, whole, with the columns of padding on both sides.
void PixelSource::pack_rows(int64_t begin, int64_t end) {
  const int64_t area = n_.out_h * n_.out_w;
  const int64_t reach = (n_.taps / n_.kernel_w - 1) * n_.dilation_h;
  columns_ = (n_.out_w - 1) * n_.stride_w + (n_.kernel_w - 1) * n_.dilation_w + 1;
  first_image_ = begin / area;
  rows_.clear();
  int64_t total = 0;
  for (int64_t image = first_image_; image * area < end; ++image) {
    const int64_t oh_first = std::max(begin - image * area, int64_t{0}) / n_.out_w;
    const int64_t oh_last = (std::min(end - image * area, area) - 1) / n_.out_w;
    const int64_t first = std::max<int64_t>(0, oh_first * n_.stride_h - n_.pad_top);
    const int64_t last = std::min(n_.height - 1, oh_last * n_.stride_h - n_.pad_top + reach);
    rows_.push_back({first, std::max<int64_t>(0, last - first + 1), total});
    total += rows_.back().count;
  }
  panel_ = thread_scratch(Scratch::kPixelPanel, total * columns_ * n_.units);
  float* dst = panel_;
  for (size_t k = 0; k < rows_.size(); ++k) {
    for (int64_t ih = rows_[k].first; ih < rows_[k].first + rows_[k].count; ++ih) {
      const int64_t image = first_image_ + static_cast<int64_t>(k);
      const int64_t left = std::clamp<int64_t>(n_.pad_left, 0, columns_);
      const int64_t inside = std::clamp<int64_t>(n_.width + n_.pad_left, left, columns_) - left;
      std::fill_n(dst, left * n_.units, 0.f);
      if (inside > 0) pack_run(n_.pixel(image, ih, left - n_.pad_left), 1, inside, dst + left * n_.units);
      std::fill_n(dst + (left + inside) * n_.units, (columns_ - left - inside) * n_.units, 0.f);
      dst += columns_ * n_.units;
    }
  }
}

void PixelSource::pack_run(const char* pixel, int64_t apart, int64_t count, float* dst) const {
  const int64_t step = apart * n_.x_stride_w;
  if (access_.gapless && apart == 1 && access_.pixel_floats == n_.units) {
    std::memcpy(dst, pixel, static_cast<size_t>(count * n_.units) * sizeof(float));
    return;
  }
  if (access_.gather) {
    access_.gather.run({count, pixel, step, dst, access_.pixel_floats * (n_.pairs ? 2 : 1), n_.channels_in, n_.kept_in,
                        access_.gather_steps.data(), n_.has_prologue, n_.in_scale, n_.in_shift, n_.in_relu});
    return;
  }
  for (int64_t p = 0; p < count; ++p, pixel += step * n_.element_size(), dst += access_.pixel_floats) {
    if (n_.bfloat16) {
      pack_channels(reinterpret_cast<const c10::BFloat16*>(pixel), dst);
    } else {
      pack_channels(reinterpret_cast<const float*>(pixel), dst);
    }
  }
}

template <class scalar_t>
void PixelSource::pack_channels(const scalar_t* pixel, float* dst) const {
  const auto value = [&](int64_t i) {
    float v = static_cast<float>(pixel[n_.channel(i) * n_.x_stride_c]);
    if (n_.in_scale) v *= n_.in_scale[i];
    if (n_.in_shift) v += n_.in_shift[i];
    return n_.in_relu && v < 0.f ? 0.f : v;
  };
  if (n_.pairs) {
    auto* halves = reinterpret_cast<c10::BFloat16*>(dst);
    if (!n_.has_prologue) {
      for (int64_t i = 0; i < n_.kept_in; ++i) halves[i] = pixel[n_.channel(i) * n_.x_stride_c];
    } else {
      for (int64_t i = 0; i < n_.kept_in; ++i) halves[i] = static_cast<c10::BFloat16>(value(i));
    }
    if (n_.kept_in % 2) halves[n_.kept_in] = c10::BFloat16(0.f);
  } else if (n_.has_prologue) {
    for (int64_t i = 0; i < n_.kept_in; ++i) dst[i] = value(i);
  } else if (n_.x_stride_c == 1 && n_.in_index) {
    for (int64_t i = 0; i < n_.kept_in; ++i) dst[i] = static_cast<float>(pixel[n_.in_index[i]]);
  } else {
    for (int64_t i = 0; i < n_.kept_in; ++i) dst[i] = static_cast<float>(pixel[n_.channel(i) * n_.x_stride_c]);
  }
}

}  // namespace bap_kernels
