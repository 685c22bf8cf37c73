// Driver of channels_last results: tiles of output pixels x output channels.
//   y[pixel, j] = sum over taps and listed channels of x[pixel's tap, in_index[i]] * w[j, i, tap]
// A table of pointers names each pixel's tap, so stride, padding and dilation cost nothing in the kernel; padded taps
// point at zeros. Where the input's channels are contiguous floats, the kernel reads them in place through the list.
// Otherwise (bfloat16, a fused prologue, strided channels) a thread first packs the rows that its block needs.
// Tasks are blocks of pixels x groups of weight panels. No atomics; the order of each sum is fixed by the reduction.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "cpu/native_call.h"

namespace bap_kernels {
namespace {

using micro::Segment;
using micro::TileArgs;

constexpr int kPointerSlot = 0, kPartialSlot = 1, kPanelSlot = 2, kZeroSlot = 3;
constexpr int64_t kPixelsPerBlock = 120;
// Weights of one reduction block up to this size stay in the L2 cache, so a tile can visit all of them in turn.
constexpr int64_t kWeightsNear = 192 * 1024;
// More prefetches than a core tracks at once would stall it.
constexpr int64_t kLinesAtOnce = 16;

// The reduction cut into blocks of at most kReductionBlock steps, each a run of segments.
struct Reduction {
  struct Block {
    int64_t first_segment, segments, first_step;
  };
  std::vector<Segment> segments;
  std::vector<Block> blocks;

  explicit Reduction(const NativeCall& n) {
    int64_t step = 0, room = 0;
    for (int64_t tap = 0; tap < n.taps; ++tap) {
      for (int64_t begin = 0; begin < n.units;) {
        if (room == 0) {
          blocks.push_back({static_cast<int64_t>(segments.size()), 0, step});
          room = kReductionBlock;
        }
        const int64_t count = std::min(room, n.units - begin);
        segments.push_back({static_cast<int32_t>(tap), static_cast<int32_t>(begin), static_cast<int32_t>(count)});
        ++blocks.back().segments;
        begin += count;
        room -= count;
        step += count;
      }
    }
  }
};

// Where the kernel finds a pixel's channels: in x itself, or in rows packed for a block of output pixels.
class Source {
 public:
  explicit Source(const NativeCall& n) : n_(n), direct_(!n.bfloat16 && !n.has_prologue && n.x_stride_c == 1) {}

  // Offsets of the channel units from a pixel's pointer.
  const int32_t* offsets() const { return direct_ && n_.in_index ? n_.in_index : counting(n_.units); }

  // Prepares the output pixels [begin, end) and fills table[tile][tap][row].
  void pointers(int64_t begin, int64_t end, int64_t rows, const float** table) {
    const float* const zeros = zero_pixel(direct_ ? n_.channels_in : n_.units);
    if (!direct_) pack_block(begin, end);
    const int64_t area = n_.out_h * n_.out_w;
    int64_t image = begin / area, oh = begin % area / n_.out_w, ow = begin % n_.out_w;
    for (int64_t tile = begin; tile < end; tile += rows, table += n_.taps * rows) {
      for (int64_t r = 0; r < std::min(rows, end - tile); ++r) {
        if (n_.taps == 1) {
          table[r] = tap_pointer(image, oh * n_.stride_h - n_.pad_top, ow * n_.stride_w - n_.pad_left, tile - begin + r,
                                 zeros);
        } else {
          fill_taps(image, oh, ow, tile - begin + r, zeros, rows, table + r);
        }
        if (++ow == n_.out_w) {
          ow = 0;
          if (++oh == n_.out_h) oh = 0, ++image;
        }
      }
    }
  }

  // Cache lines to ask for ahead of a tile; none where several taps share them or a thread packs them first.
  int64_t lines(int64_t rows) const { return direct_ && n_.taps == 1 ? rows * (n_.channels_in / 16 + 1) : 0; }

  // Asks for the channels of the tile's pixels [first, last).
  void prefetch(const float* const* tile, int64_t first, int64_t last) const {
    if (!direct_ || n_.taps != 1) return;
    for (int64_t r = first; r < last; ++r) {
      for (int64_t c = 0; c < n_.channels_in; c += 16) __builtin_prefetch(tile[r] + c);
    }
  }

 private:
  const float* tap_pointer(int64_t image, int64_t ih, int64_t iw, int64_t local, const float* zeros) const {
    if (ih < 0 || ih >= n_.height || iw < 0 || iw >= n_.width) return zeros;
    return direct_ ? reinterpret_cast<const float*>(n_.pixel(image, ih, iw)) : packed_pixel(image, ih, iw, local);
  }

  void fill_taps(int64_t image, int64_t oh, int64_t ow, int64_t local, const float* zeros, int64_t rows,
                 const float** slot) const {
    const int64_t kernel_h = n_.taps / n_.kernel_w;
    int64_t ih = oh * n_.stride_h - n_.pad_top;
    for (int64_t kh = 0; kh < kernel_h; ++kh, ih += n_.dilation_h) {
      int64_t iw = ow * n_.stride_w - n_.pad_left;
      for (int64_t kw = 0; kw < n_.kernel_w; ++kw, iw += n_.dilation_w, slot += rows) {
        *slot = tap_pointer(image, ih, iw, local, zeros);
      }
    }
  }

  static const int32_t* counting(int64_t count) {
    thread_local std::vector<int32_t> numbers;
    while (static_cast<int64_t>(numbers.size()) < count) numbers.push_back(static_cast<int32_t>(numbers.size()));
    return numbers.data();
  }

  static const float* zero_pixel(int64_t floats) {
    thread_local std::vector<float> zeros;
    if (static_cast<int64_t>(zeros.size()) < floats) zeros.assign(floats, 0.f);
    return zeros.data();
  }

  struct Rows {  // the input rows of one image that a block reads, and where they lie in the panel
    int64_t first, count, offset;
  };

  const float* packed_pixel(int64_t image, int64_t ih, int64_t iw, int64_t local) const {
    if (n_.taps == 1) return panel_ + local * n_.units;
    const Rows& r = rows_[image - first_image_];
    return panel_ + ((r.offset + ih - r.first) * n_.width + iw) * n_.units;
  }

  void pack_block(int64_t begin, int64_t end) {
    const int64_t area = n_.out_h * n_.out_w;
    if (n_.taps == 1) {
      panel_ = thread_scratch(kPanelSlot, (end - begin) * n_.units);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t ih = p % area / n_.out_w * n_.stride_h - n_.pad_top;
        const int64_t iw = p % n_.out_w * n_.stride_w - n_.pad_left;
        if (ih < 0 || ih >= n_.height || iw < 0 || iw >= n_.width) continue;
        pack_pixel(n_.pixel(p / area, ih, iw), panel_ + (p - begin) * n_.units);
      }
      return;
    }
    first_image_ = begin / area;
    rows_.clear();
    int64_t total = 0;
    const int64_t reach = (n_.taps / n_.kernel_w - 1) * n_.dilation_h;
    for (int64_t image = first_image_; image * area < end; ++image) {
      const int64_t oh_first = std::max(begin - image * area, int64_t{0}) / n_.out_w;
      const int64_t oh_last = (std::min(end - image * area, area) - 1) / n_.out_w;
      const int64_t first = std::max<int64_t>(0, oh_first * n_.stride_h - n_.pad_top);
      const int64_t last = std::min(n_.height - 1, oh_last * n_.stride_h - n_.pad_top + reach);
      rows_.push_back({first, std::max<int64_t>(0, last - first + 1), total});
      total += rows_.back().count;
    }
    panel_ = thread_scratch(kPanelSlot, total * n_.width * n_.units);
    for (size_t k = 0; k < rows_.size(); ++k) {
      for (int64_t r = 0; r < rows_[k].count; ++r) {
        for (int64_t iw = 0; iw < n_.width; ++iw) {
          pack_pixel(n_.pixel(first_image_ + static_cast<int64_t>(k), rows_[k].first + r, iw),
                     panel_ + ((rows_[k].offset + r) * n_.width + iw) * n_.units);
        }
      }
    }
  }

  void pack_pixel(const char* pixel, float* dst) const {
    if (n_.bfloat16) {
      pack_channels(reinterpret_cast<const c10::BFloat16*>(pixel), dst);
    } else {
      pack_channels(reinterpret_cast<const float*>(pixel), dst);
    }
  }

  template <class scalar_t>
  void pack_channels(const scalar_t* pixel, float* dst) const {
    const auto value = [&](int64_t i) {
      float v = static_cast<float>(pixel[n_.channel(i) * n_.x_stride_c]);
      if (n_.in_scale) v *= n_.in_scale[i];
      if (n_.in_shift) v += n_.in_shift[i];
      return n_.in_relu && v < 0.f ? 0.f : v;
    };
    if (n_.pairs) {
      auto* halves = reinterpret_cast<c10::BFloat16*>(dst);
      for (int64_t i = 0; i < n_.kept_in; ++i) halves[i] = static_cast<c10::BFloat16>(value(i));
      if (n_.kept_in % 2) halves[n_.kept_in] = c10::BFloat16(0.f);
    } else if (!n_.has_prologue) {
      for (int64_t i = 0; i < n_.kept_in; ++i) dst[i] = static_cast<float>(pixel[n_.channel(i) * n_.x_stride_c]);
    } else {
      for (int64_t i = 0; i < n_.kept_in; ++i) dst[i] = value(i);
    }
  }

  const NativeCall& n_;
  const bool direct_;
  float* panel_ = nullptr;
  int64_t first_image_ = 0;
  std::vector<Rows> rows_;
};

// One task: output pixels [begin, end), weight panels [first_panel, last_panel).
void run_task(const NativeCall& n, const Reduction& reduction, const float* weight, int64_t begin, int64_t end,
              int64_t first_panel, int64_t last_panel) {
  const int64_t rows = n.tiles->rows, lanes = n.tiles->lanes, width = micro::kMaxVectors * lanes;
  const int64_t tiles = (end - begin + rows - 1) / rows, panels = last_panel - first_panel;
  Source source(n);
  auto** table = reinterpret_cast<const float**>(thread_scratch(kPointerSlot, tiles * n.taps * rows * 2));
  source.pointers(begin, end, rows, table);
  const bool blocked = reduction.blocks.size() > 1;
  float* partial = blocked ? thread_scratch(kPartialSlot, tiles * (last_panel - first_panel) * rows * width) : nullptr;
  const int64_t row_bytes = n.kept_out * n.element_size();
  const int64_t full_tiles = (end - begin) / rows, last_rows = (end - begin) % rows;

  TileArgs t{};
  t.row_stride = static_cast<int32_t>(rows);
  t.out_row_stride = row_bytes;
  t.offsets = source.offsets();
  t.relu = n.out_relu;
  t.bfloat16 = n.bfloat16;
  for (size_t b = 0; b < reduction.blocks.size(); ++b) {
    const auto& block = reduction.blocks[b];
    t.segments = reduction.segments.data() + block.first_segment;
    t.segment_count = static_cast<int32_t>(block.segments);
    t.load_partial = b > 0;
    t.store_partial = b + 1 < reduction.blocks.size();
    // `count` tiles from (tile, panel) on, the next tile or the next panel each time.
    const auto run = [&](int64_t tile, int64_t tile_rows, int64_t panel, int64_t count, bool along_panels) {
      const int64_t channel = panel * width;
      const int vectors = n.kept_out - channel <= lanes ? 1 : 2;
      t.tiles = static_cast<int32_t>(count);
      t.weight = weight + channel * n.depth + block.first_step * vectors * lanes;
      t.valid = static_cast<int32_t>(std::min<int64_t>(n.kept_out - channel, vectors * lanes));
      t.scale = n.scale.empty() ? nullptr : n.scale.data() + channel;
      t.shift = n.shift.empty() ? nullptr : n.shift.data() + channel;
      t.source = table + tile * n.taps * rows;
      t.partial = partial + (tile * panels + panel - first_panel) * rows * width;
      const int64_t place = (begin + tile * rows) * row_bytes + channel * n.element_size();
      t.out = n.y + place;
      t.residual = n.residual ? n.residual + place : nullptr;
      t.weight_step = along_panels ? width * n.depth : 0;
      t.source_step = along_panels ? 0 : n.taps * rows;
      t.partial_step = (along_panels ? 1 : panels) * rows * width;
      t.channel_step = along_panels ? width : 0;
      t.out_step = along_panels ? width * n.element_size() : rows * row_bytes;
      n.tiles->pixel_rows[tile_rows - 1][vectors - 1](t);
    };
    const int64_t full_panels = std::min(last_panel, n.kept_out / width) - first_panel;
    const bool panels_inside = kReductionBlock * panels * width * int64_t{4} <= kWeightsNear;
    if (panels_inside) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t tile_rows = std::min(rows, end - begin - tile * rows);
        // While a tile is computed, the next one's pixels come closer, a few lines at a time.
        const bool ahead = b == 0 && tile + 1 < full_tiles;
        const float* const* next = table + (tile + 1) * n.taps * rows;
        const int64_t chunks =
            ahead ? std::max<int64_t>(1, std::min(full_panels, source.lines(rows) / kLinesAtOnce)) : 1;
        for (int64_t c = 0; c < chunks; ++c) {
          if (ahead) source.prefetch(next, rows * c / chunks, rows * (c + 1) / chunks);
          const int64_t p = full_panels * c / chunks, q = full_panels * (c + 1) / chunks;
          if (q > p) run(tile, tile_rows, first_panel + p, q - p, true);
        }
        if (full_panels < panels) run(tile, tile_rows, last_panel - 1, 1, true);
      }
    } else {
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        if (full_tiles > 0) run(0, rows, panel, full_tiles, false);
        if (last_rows > 0) run(full_tiles, last_rows, panel, 1, false);
      }
    }
  }
}

}  // namespace

void run_pixel_rows(const NativeCall& n, const float* weight) {
  const int64_t rows = n.tiles->rows, width = micro::kMaxVectors * n.tiles->lanes;
  const int64_t tiles = (n.pixels() + rows - 1) / rows, panels = (n.kept_out + width - 1) / width;
  const TaskGrid grid = make_task_grid(tiles, panels, kPixelsPerBlock / rows, n.threads);
  const Reduction reduction(n);
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t block = task / grid.channel_groups, group = task % grid.channel_groups;
      run_task(n, reduction, weight, block * tiles / grid.pixel_blocks * rows,
               std::min(n.pixels(), (block + 1) * tiles / grid.pixel_blocks * rows),
               group * panels / grid.channel_groups, (group + 1) * panels / grid.channel_groups);
    }
  };
  at::parallel_for(0, grid.tasks(), 1, run);
}

}  // namespace bap_kernels
