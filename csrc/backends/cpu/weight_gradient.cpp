// Weight gradient: an outer product summed over pixels, by the forward's tiles.
//   dw[filter j, in_index[i], kh, kw] = sum over n, oh, ow of dy[n, j, oh, ow] * x[n, in_index[i], ih, iw]
// A tile's rows are (channel, tap) pairs and its lanes are filters; its reduction runs over output pixels: dy is packed
// into panels of lanes, x is found through a pointer for each row plus an offset for each pixel, so a tap is a shifted
// pointer and a stride costs nothing. Where there is padding to skip, or bfloat16 to convert, the listed channels of a
// block's image rows are first copied, channel by channel, with their padding; else x is read in place.
// Tasks are slabs of pixels x groups of channels. Each slab has sums of its own, added in order at the end; slabs
// depend on the shape alone and groups change no sum, so results do not vary with threads or runs. Sums are fp32.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <limits>

#include "backends/cpu/gradient_call.h"
#include "backends/cpu/isa.h"
#include "backends/cpu/native_call.h"
#include "backends/cpu/scratch.h"
#include "backends/cpu/winograd.h"

namespace bap_kernels {
namespace {

using micro::Segment;
using micro::TileArgs;

constexpr int64_t kMostPixels = 256, kFewestPixels = 64, kFilterFloats = 48 * 1024;
constexpr int64_t kMostTasks = 16;
constexpr int64_t kPixelsPerSlab = 512, kRowsPerGroup = 288, kFewestRows = 24;
constexpr int64_t kSlabFloats = 4 * 1024 * 1024;

struct Shape {
  const micro::KernelTable* tiles;
  int64_t rows, lanes, width;  // of the largest tile
  int64_t filters, panels, taps;
  int64_t pixels, pixels_per_block, slabs, groups;
  bool in_place;
  int64_t panel_floats;                 // sums of one row tile over all panels
  std::vector<int64_t> first_row_tile;  // of each group, and the end
  int64_t group_channel(int64_t g, int64_t kept_in) const { return g * kept_in / groups; }
};

// The largest that is not above `most`, or 1. Tasks of such a number are shared out evenly by most numbers of threads.
int64_t power_of_two(int64_t most) {
  int64_t p = 1;
  while (2 * p <= most) p *= 2;
  return p;
}

Shape make_shape(const GradientCall& c) {
  Shape s{};
  const auto& geometry = c.shape;
  s.tiles = isa_tiles(false);
  s.rows = s.tiles->rows;
  s.lanes = s.tiles->lanes;
  s.width = micro::kMaxVectors * s.lanes;
  s.filters = c.live_count();
  s.panels = (s.filters + s.width - 1) / s.width;
  s.taps = c.taps();
  s.pixels = geometry.batch * geometry.out_h * geometry.out_w;
  s.pixels_per_block = std::clamp(kFilterFloats / (s.panels * s.width), kFewestPixels, kMostPixels);
  const bool padded = c.padding[kTop] > 0 || c.padding[kBottom] > 0 || c.padding[kLeft] > 0 || c.padding[kRight] > 0;
  // Offsets inside a block are 32 bits wide.
  const int64_t images = s.pixels_per_block / std::max<int64_t>(1, geometry.out_h * geometry.out_w) + 2;
  const int64_t reach = std::min(images, geometry.batch) * c.input.stride(0) + geometry.height * c.input.stride(2) +
                        geometry.width * c.input.stride(3);
  s.in_place = !padded && !c.bfloat16() && reach < std::numeric_limits<int32_t>::max();
  const int64_t floats = geometry.kept_in * s.taps * s.panels * s.width;
  s.slabs = power_of_two(std::min({s.pixels / kPixelsPerSlab, kSlabFloats / floats, kMostTasks}));
  s.groups =
      power_of_two(std::min({kMostTasks / s.slabs, geometry.kept_in * s.taps / kRowsPerGroup, geometry.kept_in}));
  // Groups, unlike slabs, change no sum: for more threads than two there are as many as these need, if not too small.
  const int64_t threads = free_threads();
  if (threads > 2) {
    const int64_t rounds = (s.slabs * s.groups + threads - 1) / threads;
    const int64_t wanted = (rounds * threads + s.slabs - 1) / s.slabs;
    const int64_t most = std::min(geometry.kept_in, geometry.kept_in * s.taps / kFewestRows);
    s.groups = std::clamp(wanted, s.groups, std::max(most, s.groups));
  }
  s.panel_floats = s.panels * s.rows * s.width;
  s.first_row_tile.push_back(0);
  for (int64_t g = 0; g < s.groups; ++g) {
    const int64_t channels = s.group_channel(g + 1, geometry.kept_in) - s.group_channel(g, geometry.kept_in);
    s.first_row_tile.push_back(s.first_row_tile.back() + (channels * s.taps + s.rows - 1) / s.rows);
  }
  return s;
}

// One task's view of one block of output pixels [begin, end), numbered through the batch.
template <class scalar_t>
class Block {
 public:
  Block(const GradientCall& c, const Shape& s, int64_t first_channel, int64_t last_channel)
      : c_(c), s_(s), first_(first_channel), last_(last_channel) {
    x_ = c.input.const_data_ptr<scalar_t>();
    dy_ = c.grad_output.const_data_ptr<scalar_t>();
    columns_ = (c.shape.out_w - 1) * c.stride[1] + (c.shape.kernel_w - 1) * c.dilation[1] + 1;
  }

  void prepare(int64_t begin, int64_t end) {
    begin_ = begin, end_ = end;
    pack_filters();
    const auto& g = c_.shape;
    const int64_t area = g.out_h * g.out_w;
    offsets_.clear();
    if (!s_.in_place) pack_channels();
    int64_t image = begin / area, oh = begin % area / g.out_w, ow = begin % g.out_w;
    const int64_t first_image = image;
    for (int64_t p = begin; p < end; ++p) {
      if (s_.in_place) {
        offsets_.push_back(static_cast<int32_t>((image - first_image) * c_.input.stride(0) +
                                                oh * c_.stride[0] * c_.input.stride(2) +
                                                ow * c_.stride[1] * c_.input.stride(3)));
      } else {
        const Rows& r = images_[image - first_image];
        const int64_t row = r.offset + oh * c_.stride[0] - c_.padding[kTop] - r.first;
        offsets_.push_back(static_cast<int32_t>(row * columns_ + ow * c_.stride[1]));
      }
      if (++ow == g.out_w) {
        ow = 0;
        if (++oh == g.out_h) oh = 0, ++image;
      }
    }
    base_ = s_.in_place ? reinterpret_cast<const float*>(x_ + first_image * c_.input.stride(0)) : panel_;
  }

  // The start of (channel first + row / taps, tap row % taps).
  const float* row(int64_t row) const {
    const int64_t i = row / s_.taps, kh = row % s_.taps / c_.shape.kernel_w, kw = row % c_.shape.kernel_w;
    const int64_t down = kh * c_.dilation[0], right = kw * c_.dilation[1];
    if (!s_.in_place) return base_ + i * pitch_ + down * columns_ + right;
    return base_ + channel(i) * c_.input.stride(1) + down * c_.input.stride(2) + right * c_.input.stride(3);
  }

  const float* filters(int64_t panel) const { return filters_ + panel * s_.width * (end_ - begin_); }
  const int32_t* offsets() const { return offsets_.data(); }
  int64_t size() const { return end_ - begin_; }

 private:
  struct Rows {  // the image rows that a block's pixels of one image meet, padding included
    int64_t first, count, offset;
  };

  int64_t channel(int64_t i) const { return c_.in_index ? c_.in_index[first_ + i] : first_ + i; }

  // dy as [panel][pixel][lane], zeros in lanes without a filter.
  void pack_filters() {
    filters_ = thread_scratch(Scratch::kGradientFilters, s_.panels * s_.width * (end_ - begin_));
    const auto& g = c_.shape;
    const int64_t area = g.out_h * g.out_w, step = c_.grad_output.stride(1);
    for (int64_t panel = 0; panel < s_.panels; ++panel) {
      const int64_t j = panel * s_.width, count = std::min(s_.width, s_.filters - j);
      const int64_t width = count <= s_.lanes ? s_.lanes : s_.width;
      int64_t place[micro::kMaxVectors * 16];
      for (int64_t l = 0; l < count; ++l) place[l] = c_.live_channel(j + l) * step;
      float* dst = const_cast<float*>(filters(panel));
      int64_t image = begin_ / area, oh = begin_ % area / g.out_w, ow = begin_ % g.out_w;
      for (int64_t p = begin_; p < end_; ++p, dst += width) {
        const scalar_t* pixel =
            dy_ + image * c_.grad_output.stride(0) + oh * c_.grad_output.stride(2) + ow * c_.grad_output.stride(3);
        if (step == 1 && c_.all_live && count == s_.width) {
          for (int64_t l = 0; l < s_.width; ++l) dst[l] = static_cast<float>(pixel[j + l]);
        } else {
          for (int64_t l = 0; l < count; ++l) dst[l] = static_cast<float>(pixel[place[l]]);
          for (int64_t l = count; l < width; ++l) dst[l] = 0.f;
        }
        if (++ow == g.out_w) {
          ow = 0;
          if (++oh == g.out_h) oh = 0, ++image;
        }
      }
    }
  }

  void pack_channels() {
    const auto& g = c_.shape;
    const int64_t area = g.out_h * g.out_w, reach = (g.kernel_h - 1) * c_.dilation[0];
    images_.clear();
    int64_t total = 0;
    for (int64_t image = begin_ / area; image * area < end_; ++image) {
      const int64_t first = std::max<int64_t>(begin_ - image * area, 0) / g.out_w;
      const int64_t last = (std::min(end_ - image * area, area) - 1) / g.out_w;
      images_.push_back({first * c_.stride[0] - c_.padding[kTop], (last - first) * c_.stride[0] + reach + 1, total});
      total += images_.back().count;
    }
    // An odd number of cache lines: planes a power of two apart would share few sets of the L1 cache.
    pitch_ = (total * columns_ + 15) / 16 * 16;
    if (pitch_ / 16 % 2 == 0) pitch_ += 16;
    panel_ = thread_scratch(Scratch::kGradientRows, (last_ - first_) * pitch_);
    for (size_t k = 0; k < images_.size(); ++k) {
      for (int64_t r = 0; r < images_[k].count; ++r) {
        pack_row(begin_ / area + static_cast<int64_t>(k), images_[k].first + r,
                 panel_ + (images_[k].offset + r) * columns_);
      }
    }
  }

  // One image row of every channel; row and columns may lie in the padding.
  void pack_row(int64_t image, int64_t ih, float* dst) {
    const auto& g = c_.shape;
    const int64_t pad = c_.padding[kLeft], channels = last_ - first_;
    const bool inside = ih >= 0 && ih < g.height;
    const int64_t low = inside ? std::clamp<int64_t>(pad, 0, columns_) : columns_;
    const int64_t high = inside ? std::clamp<int64_t>(g.width + pad, low, columns_) : columns_;
    const scalar_t* source = x_ + image * c_.input.stride(0) + ih * c_.input.stride(2) - pad * c_.input.stride(3);
    const int64_t step = c_.input.stride(3);
    if (step == 1) {
      for (int64_t i = 0; i < channels; ++i) {
        const scalar_t* plane = source + channel(i) * c_.input.stride(1);
        float* row = dst + i * pitch_;
        for (int64_t w = low; w < high; ++w) row[w] = static_cast<float>(plane[w]);
      }
    } else {
      // Eight pixels of a channel at a time: their cache lines stay near while the channels pass.
      for (int64_t from = low; from < high; from += 8) {
        const int64_t count = std::min<int64_t>(8, high - from);
        for (int64_t i = 0; i < channels; ++i) {
          const scalar_t* pixel = source + channel(i) * c_.input.stride(1) + from * step;
          float* row = dst + i * pitch_ + from;
          for (int64_t w = 0; w < count; ++w) row[w] = static_cast<float>(pixel[w * step]);
        }
      }
    }
    for (int64_t i = 0; i < channels; ++i) {
      std::fill(dst + i * pitch_, dst + i * pitch_ + low, 0.f);
      std::fill(dst + i * pitch_ + high, dst + i * pitch_ + columns_, 0.f);
    }
  }

  const GradientCall& c_;
  const Shape& s_;
  const int64_t first_, last_;  // channels of the list
  const scalar_t* x_;
  const scalar_t* dy_;
  int64_t begin_ = 0, end_ = 0, columns_, pitch_ = 0;
  float* filters_ = nullptr;
  float* panel_ = nullptr;
  const float* base_ = nullptr;
  std::vector<int32_t> offsets_;
  std::vector<Rows> images_;
};

// Sums of one slab over one group of channels: [row tile][panel][row][lane].
template <class scalar_t>
void run_task(const GradientCall& c, const Shape& s, int64_t slab, int64_t group, float* sums) {
  const int64_t first = s.group_channel(group, c.shape.kept_in), last = s.group_channel(group + 1, c.shape.kept_in);
  const int64_t begin = slab * s.pixels / s.slabs, end = (slab + 1) * s.pixels / s.slabs;
  const int64_t blocks = (end - begin + s.pixels_per_block - 1) / s.pixels_per_block;
  const int64_t rows = (last - first) * s.taps;
  Block<scalar_t> block(c, s, first, last);
  auto** table = reinterpret_cast<const float**>(thread_scratch(Scratch::kPixelPointers, s.rows * 2));
  const int64_t full_panels = s.filters % s.width == 0 || s.filters % s.width > s.lanes ? s.panels : s.panels - 1;
  for (int64_t b = 0; b < blocks; ++b) {
    block.prepare(begin + b * (end - begin) / blocks, begin + (b + 1) * (end - begin) / blocks);
    const Segment segment{0, 0, static_cast<int32_t>(block.size())};
    TileArgs t{};
    t.source = table;
    t.row_stride = static_cast<int32_t>(s.rows);
    t.offsets = block.offsets();
    t.segments = &segment;
    t.segment_count = 1;
    t.weight_step = s.width * block.size();
    t.partial_step = s.rows * s.width;
    t.load_partial = b > 0;
    t.store_partial = true;
    float* tile_sums = sums;
    for (int64_t row = 0; row < rows; row += s.rows, tile_sums += s.panel_floats) {
      const int64_t count = std::min(s.rows, rows - row);
      for (int64_t r = 0; r < count; ++r) table[r] = block.row(row + r);
      t.weight = block.filters(0);
      t.partial = tile_sums;
      t.tiles = static_cast<int32_t>(full_panels);
      if (full_panels > 0) s.tiles->conv_nhwc[count - 1][1](t);
      if (full_panels == s.panels) continue;
      t.tiles = 1;
      t.weight = block.filters(full_panels);
      t.partial = tile_sums + full_panels * t.partial_step;
      s.tiles->conv_nhwc[count - 1][0](t);
    }
  }
}

// Adds the slabs' sums of one row tile in order, and takes them to their places.
template <class scalar_t>
void finish_tile(const GradientCall& c, const Shape& s, int64_t group, int64_t tile, const float* sums,
                 int64_t slab_floats, at::Tensor& dw) {
  const int64_t first = s.group_channel(group, c.shape.kept_in), last = s.group_channel(group + 1, c.shape.kept_in);
  const int64_t first_row = (tile - s.first_row_tile[group]) * s.rows;
  const int64_t count = std::min(s.rows, (last - first) * s.taps - first_row);
  int64_t place[micro::kMaxRows];
  for (int64_t r = 0; r < count; ++r) {
    const int64_t i = first + (first_row + r) / s.taps, tap = (first_row + r) % s.taps;
    place[r] = (c.in_index ? c.in_index[i] : i) * dw.stride(1) + tap / c.shape.kernel_w * dw.stride(2) +
               tap % c.shape.kernel_w * dw.stride(3);
  }
  auto* out = dw.mutable_data_ptr<scalar_t>();
  for (int64_t panel = 0; panel < s.panels; ++panel) {
    const int64_t j = panel * s.width, filters = std::min(s.width, s.filters - j);
    const int64_t width = filters <= s.lanes ? s.lanes : s.width;
    const float* source = sums + tile * s.panel_floats + panel * s.rows * s.width;
    float total[micro::kMaxRows * micro::kMaxVectors * 16];
    std::copy_n(source, count * width, total);
    for (int64_t slab = 1; slab < s.slabs; ++slab) {
      const float* more = source + slab * slab_floats;
      for (int64_t k = 0; k < count * width; ++k) total[k] += more[k];
    }
    for (int64_t l = 0; l < filters; ++l) {
      scalar_t* filter = out + c.live_filter(j + l) * dw.stride(0);
      for (int64_t r = 0; r < count; ++r) filter[place[r]] = static_cast<scalar_t>(total[r * width + l]);
    }
  }
}

template <class scalar_t>
void run(const GradientCall& c, at::Tensor& dw) {
  const Shape s = make_shape(c);
  const int64_t slab_floats = s.first_row_tile.back() * s.panel_floats;
  const at::Tensor sums = at::empty({s.slabs * slab_floats}, at::TensorOptions().dtype(at::kFloat));
  float* data = sums.mutable_data_ptr<float>();
  const auto cycles = [&](int64_t task) {
    const int64_t slab = task / s.groups, group = task % s.groups;
    const int64_t channels = s.group_channel(group + 1, c.shape.kept_in) - s.group_channel(group, c.shape.kept_in);
    const int64_t pixels = (slab + 1) * s.pixels / s.slabs - slab * s.pixels / s.slabs;
    return direct_cycles(channels * s.taps, s.filters, pixels) + pass_cycles(pixels * (channels + s.filters));
  };
  parallel_tasks(s.slabs * s.groups, 1, cycles, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slab = task / s.groups, group = task % s.groups;
      run_task<scalar_t>(c, s, slab, group, data + slab * slab_floats + s.first_row_tile[group] * s.panel_floats);
    }
  });
  const auto add_cycles = [&](int64_t) { return pass_cycles((s.slabs + 2) * s.panel_floats); };
  parallel_tasks(s.first_row_tile.back(), 8, add_cycles, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const auto after = std::upper_bound(s.first_row_tile.begin(), s.first_row_tile.end(), tile);
      finish_tile<scalar_t>(c, s, after - s.first_row_tile.begin() - 1, tile, data, slab_floats, dw);
    }
  });
}

}  // namespace

at::Tensor native_weight_gradient(const GradientCall& c) {
  const bool every = !c.in_index && !c.out_index && c.all_live;
  const bool nothing = c.live_count() == 0 || c.shape.kept_in == 0 || c.grad_output.numel() == 0;
  at::Tensor dw = every && !nothing ? at::empty_like(c.weight) : at::zeros_like(c.weight);
  if (nothing) return dw;
  if (const int64_t size = winograd_of_weight_gradient(c)) {
    winograd_weight_gradient(c, size, dw);
  } else if (c.bfloat16()) {
    run<c10::BFloat16>(c, dw);
  } else {
    run<float>(c, dw);
  }
  return dw;
}

}  // namespace bap_kernels
