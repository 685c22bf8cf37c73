// Driver of contiguous (NCHW) results: tiles of output channels x output pixels.
//   y[j, pixel] = sum over listed channels and taps of w[j, i, tap] * x[in_index[i], pixel's tap]
// A thread packs, for a block of output pixels and a block of the reduction, one row of pixels for each listed channel
// and tap: whole runs of an image row are copied, unlisted planes are never touched. All panels of the weight then
// read that cache-sized panel. Pixels are numbered through the whole batch, so small images share tiles.
// Tasks are blocks of pixels x groups of weight panels. No atomics; the order of each sum is fixed by the reduction.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "cpu/native_call.h"

namespace bap_kernels {
namespace {

using micro::TileArgs;

constexpr int kPanelSlot = 0, kPartialSlot = 1;
// Odd multiples of a tile: a power of two between the panel's rows would make them share few sets of the L1 cache.
constexpr int64_t kTilesPerBlock = 7;

// Consecutive output pixels of one image row.
struct Run {
  int64_t image, oh, ow, length, place;
};

// Copies `count` floats without reading or writing past either end; short counts are the usual ones here.
inline void copy_floats(float* dst, const float* src, int64_t count) {
  if (count >= 4) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) std::memcpy(dst + i, src + i, 32);
    if (i + 4 <= count) std::memcpy(dst + i, src + i, 16), i += 4;
    if (i < count) std::memcpy(dst + count - 4, src + count - 4, 16);  // overlaps what is already there
    return;
  }
  for (int64_t i = 0; i < count; ++i) dst[i] = src[i];
}

class PanelPacker {
 public:
  PanelPacker(const NativeCall& n, int64_t begin, int64_t end) : n_(n), pixels_(end - begin) {
    const int64_t area = n.out_h * n.out_w;
    for (int64_t p = begin; p < end;) {
      const int64_t ow = p % n.out_w, length = std::min(n.out_w - ow, end - p);
      runs_.push_back({p / area, p % area / n.out_w, ow, length, p - begin});
      p += length;
    }
  }

  // Rows of units [first, last), `row` floats apart, pixels padded with zeros up to `padded`.
  void pack(int64_t first, int64_t last, int64_t padded, int64_t row, float* panel) const {
    for (int64_t unit = first; unit < last; ++unit) {
      for (int64_t tap = 0; tap < n_.taps; ++tap, panel += row) {
        if (n_.bfloat16) {
          pack_row<c10::BFloat16>(unit, tap, panel);
        } else {
          pack_row<float>(unit, tap, panel);
        }
        std::fill(panel + pixels_, panel + padded, 0.f);
      }
    }
  }

 private:
  template <class scalar_t>
  void pack_row(int64_t unit, int64_t tap, float* row) const {
    const int64_t down = tap / n_.kernel_w * n_.dilation_h - n_.pad_top;
    const int64_t right = tap % n_.kernel_w * n_.dilation_w - n_.pad_left;
    for (const Run& run : runs_) {
      float* dst = row + run.place;
      const int64_t ih = run.oh * n_.stride_h + down;
      // The run's pixels whose tap lies inside the image: [low, high).
      int64_t low = 0, high = 0;
      if (ih >= 0 && ih < n_.height) {
        const int64_t start = run.ow * n_.stride_w + right;
        low = start >= 0 ? 0 : (-start + n_.stride_w - 1) / n_.stride_w;
        high = n_.width - 1 - start < 0 ? 0 : (n_.width - 1 - start) / n_.stride_w + 1;
        low = std::min(low, run.length);
        high = std::max(low, std::min(high, run.length));
      }
      for (int64_t i = 0; i < low; ++i) dst[i] = 0.f;
      if (low < high) {
        const auto* src = reinterpret_cast<const scalar_t*>(
            n_.pixel(run.image, ih, (run.ow + low) * n_.stride_w + right));
        copy_run(src, unit, high - low, dst + low);
      }
      for (int64_t i = high; i < run.length; ++i) dst[i] = 0.f;
    }
  }

  template <class scalar_t>
  void copy_run(const scalar_t* src, int64_t unit, int64_t count, float* dst) const {
    const int64_t step = n_.stride_w * n_.x_stride_w;
    if (n_.pairs) {
      auto* halves = reinterpret_cast<c10::BFloat16*>(dst);
      copy_channel(src, 2 * unit, count, step, [&](int64_t i, float v) { halves[2 * i] = static_cast<c10::BFloat16>(v); });
      if (2 * unit + 1 < n_.kept_in) {
        copy_channel(src, 2 * unit + 1, count, step,
                     [&](int64_t i, float v) { halves[2 * i + 1] = static_cast<c10::BFloat16>(v); });
      } else {
        for (int64_t i = 0; i < count; ++i) halves[2 * i + 1] = c10::BFloat16(0.f);
      }
      return;
    }
    if constexpr (std::is_same_v<scalar_t, float>) {
      if (step == 1 && !n_.has_prologue) {
        copy_floats(dst, src + n_.channel(unit) * n_.x_stride_c, count);
        return;
      }
    }
    copy_channel(src, unit, count, step, [&](int64_t i, float v) { dst[i] = v; });
  }

  template <class scalar_t, class Put>
  void copy_channel(const scalar_t* src, int64_t i, int64_t count, int64_t step, const Put& put) const {
    src += n_.channel(i) * n_.x_stride_c;
    if (!n_.has_prologue) {
      for (int64_t p = 0; p < count; ++p) put(p, static_cast<float>(src[p * step]));
      return;
    }
    const float scale = n_.in_scale ? n_.in_scale[i] : 1.f, shift = n_.in_shift ? n_.in_shift[i] : 0.f;
    for (int64_t p = 0; p < count; ++p) {
      const float v = static_cast<float>(src[p * step]) * scale + shift;
      put(p, n_.in_relu && v < 0.f ? 0.f : v);
    }
  }

  const NativeCall& n_;
  const int64_t pixels_;
  std::vector<Run> runs_;
};

// Moves `count` pixels, numbered through the batch from `pixel`, between a tile's row and one channel's planes.
void move_pixels(const NativeCall& n, char* planes, int64_t channel, int64_t pixel, int64_t count, char* row, bool out) {
  const int64_t area = n.out_h * n.out_w, size = n.element_size();
  for (int64_t done = 0; done < count;) {
    const int64_t at = pixel + done, length = std::min(count - done, area - at % area);
    char* plane = planes + ((at / area * n.kept_out + channel) * area + at % area) * size;
    if (out) {
      std::memcpy(plane, row + done * size, length * size);
    } else {
      std::memcpy(row + done * size, plane, length * size);
    }
    done += length;
  }
}

// One task: output pixels [begin, end), weight panels [first_panel, last_panel).
void run_task(const NativeCall& n, const float* weight, int64_t begin, int64_t end, int64_t first_panel,
              int64_t last_panel) {
  const int64_t rows = n.tiles->rows, lanes = n.tiles->lanes, width = micro::kMaxVectors * lanes;
  const int64_t area = n.out_h * n.out_w, size = n.element_size();
  const int64_t padded = (end - begin + lanes - 1) / lanes * lanes;
  const int64_t tiles = (padded + width - 1) / width;
  const int64_t row = (tiles % 2 ? tiles : tiles + 1) * width;
  const int64_t units_per_block = std::max<int64_t>(1, kReductionBlock / n.taps);
  const bool blocked = n.units > units_per_block;
  float* panel = thread_scratch(kPanelSlot, std::min(units_per_block, n.units) * n.taps * row);
  float* partial = blocked ? thread_scratch(kPartialSlot, tiles * (last_panel - first_panel) * rows * width) : nullptr;
  const PanelPacker packer(n, begin, end);

  alignas(64) char straddle_out[micro::kMaxRows][64 * micro::kMaxVectors];
  alignas(64) char straddle_residual[micro::kMaxRows][64 * micro::kMaxVectors];
  void* out[micro::kMaxRows];
  const void* residual[micro::kMaxRows];
  TileArgs t{};
  t.panel_stride = row;
  t.out = out;
  t.residual = n.residual ? residual : nullptr;
  t.relu = n.out_relu;
  t.bfloat16 = n.bfloat16;
  for (int64_t unit = 0; unit < n.units; unit += units_per_block) {
    const int64_t last_unit = std::min(n.units, unit + units_per_block);
    packer.pack(unit, last_unit, padded, row, panel);
    t.depth = (last_unit - unit) * n.taps;
    t.load_partial = unit > 0;
    t.store_partial = last_unit < n.units;
    float* sums = partial;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t pixel = begin + tile * width;
      const int vectors = padded - tile * width <= lanes ? 1 : 2;
      t.valid = static_cast<int32_t>(std::min<int64_t>(vectors * lanes, end - pixel));
      t.panel = panel + tile * width;
      const bool straddles = pixel % area + t.valid > area;  // pixels of two or more images in one tile
      for (int64_t p = first_panel; p < last_panel; ++p) {
        const int64_t channel = p * rows, count = std::min(rows, n.kept_out - channel);
        t.weight = weight + channel * n.depth + unit * n.taps * count;
        t.partial = sums;
        t.scale = n.scale.empty() ? nullptr : n.scale.data() + channel;
        t.shift = n.shift.empty() ? nullptr : n.shift.data() + channel;
        const bool final = !t.store_partial;
        for (int64_t r = 0; final && r < count; ++r) {
          const int64_t place = ((pixel / area * n.kept_out + channel + r) * area + pixel % area) * size;
          out[r] = straddles ? straddle_out[r] : n.y + place;
          if (!n.residual) continue;
          residual[r] = straddles ? straddle_residual[r] : n.residual + place;
          if (straddles) {
            move_pixels(n, const_cast<char*>(n.residual), channel + r, pixel, t.valid, straddle_residual[r], false);
          }
        }
        n.tiles->channel_rows[count - 1][vectors - 1](t);
        if (straddles && final) {
          for (int64_t r = 0; r < count; ++r) move_pixels(n, n.y, channel + r, pixel, t.valid, straddle_out[r], true);
        }
        if (blocked) sums += rows * width;
      }
    }
  }
}

}  // namespace

void run_channel_rows(const NativeCall& n, const float* weight) {
  const int64_t width = micro::kMaxVectors * n.tiles->lanes;
  const int64_t tiles = (n.pixels() + width - 1) / width, panels = (n.kept_out + n.tiles->rows - 1) / n.tiles->rows;
  const TaskGrid grid = make_task_grid(tiles, panels, kTilesPerBlock, n.threads);
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t block = task / grid.channel_groups, group = task % grid.channel_groups;
      run_task(n, weight, block * tiles / grid.pixel_blocks * width,
               std::min(n.pixels(), (block + 1) * tiles / grid.pixel_blocks * width),
               group * panels / grid.channel_groups, (group + 1) * panels / grid.channel_groups);
    }
  };
  at::parallel_for(0, grid.tasks(), 1, run);
}

}  // namespace bap_kernels
