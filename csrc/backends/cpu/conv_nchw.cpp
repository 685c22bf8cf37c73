// Driver of contiguous (NCHW) results: tiles of output channels x output pixels.
//   y[j, pixel] = sum over listed channels and taps of w[j, i, tap] * x[in_index[i], pixel's tap]
// A thread packs, for a block of output pixels and a block of the reduction, one row of pixels for each listed channel
// and tap, eight pixels at a time; unlisted planes are never touched. All panels of the weight then read that
// cache-sized panel. Pixels are numbered through the whole batch, so small images share tiles.
// Tasks are blocks of pixels x groups of weight panels. No atomics; the order of each sum is fixed by the reduction.
#include <algorithm>
#include <cstring>

#include "backends/cpu/microkernels/pack_row.h"
#include "backends/cpu/native_call.h"
#include "backends/cpu/scratch.h"

namespace bap_kernels {
namespace {

using micro::kAllLanes;
using micro::kRowLanes;
using micro::RowPart;
using micro::RowPrologue;
using micro::TileArgs;

// A block's panel stays in the L2 cache beside the weights that stream through it.
constexpr int64_t kPanelBytes = 200 * 1024;
constexpr int64_t kPrefetchDistance = 4;  // channels
// More prefetches than a core tracks at once would stall it.
constexpr int64_t kLinesAtOnce = 64;

// Fills the rows of a block's panel. Where a row's groups of lanes lie is the same in every channel, so it is worked
// out once. Neighbouring rows of the image need no part of their own where they follow each other in memory just as in
// the result: with stride 1 and an image as wide as its result, a group is one load whose mask leaves the padding out.
class PanelPacker {
 public:
  // Output pixels [begin, end), padded with zeros to a width of `padded`.
  PanelPacker(const NativeCall& n, int64_t begin, int64_t end, int64_t padded) : n_(n), groups_(padded / kRowLanes) {
    const int64_t area = n.out_h * n.out_w;
    parts_.reserve(n.taps * (groups_ + (end - begin) / n.out_w + 1));
    for (int64_t tap = 0; tap < n.taps; ++tap) {
      first_part_.push_back(static_cast<int64_t>(parts_.size()));
      group_ = -1;
      for (int64_t p = begin; p < end;) {
        const int64_t ow = p % n.out_w, length = std::min(n.out_w - ow, end - p);
        add_run(tap, p / area, p % area / n.out_w, ow, length, p - begin);
        p += length;
      }
      begin_group(groups_ - 1);
    }
    first_part_.push_back(static_cast<int64_t>(parts_.size()));
  }

  // Rows of units [first, last), `row` floats apart.
  void pack(int64_t first, int64_t last, int64_t row, float* panel) const {
    for (int64_t unit = first; unit < last; ++unit) {
      if (unit + kPrefetchDistance < last) prefetch(unit + kPrefetchDistance, 0);
      for (int64_t tap = 0; tap < n_.taps; ++tap, panel += row) pack_row(unit, tap, panel);
    }
  }

  // Asks for a unit's rows, `shift` output pixels further on; planes lie where no hardware prefetcher looks ahead.
  void prefetch(int64_t unit, int64_t shift) const {
    const int64_t channel = n_.channel(n_.pairs ? 2 * unit : unit), size = n_.element_size();
    const int64_t step = n_.stride_w * n_.x_stride_w * size;
    const char* plane = n_.x + (shift * n_.stride_w * n_.x_stride_w + channel * n_.x_stride_c) * size;
    // The rows that the middle taps read are those of the other taps too.
    const int64_t kernel_h = n_.taps / n_.kernel_w, middle_h = kernel_h / 2;
    for (int64_t kh = std::max<int64_t>(0, middle_h - n_.stride_h + 1); kh <= middle_h; ++kh) {
      const int64_t tap = kh * n_.kernel_w + n_.kernel_w / 2;
      for (int64_t i = first_part_[tap]; i < first_part_[tap + 1]; ++i) {
        if (parts_[i].mask == 0) continue;
        const char* at = plane + parts_[i].source * size;
        for (int64_t b = 0; b < parts_[i].groups * kRowLanes * step; b += 64) __builtin_prefetch(at + b);
      }
    }
  }

 private:
  // A run of output pixels of one image row, the first of them at `place`.
  void add_run(int64_t tap, int64_t image, int64_t oh, int64_t ow, int64_t length, int64_t place) {
    const int64_t ih = oh * n_.stride_h + tap / n_.kernel_w * n_.dilation_h - n_.pad_top;
    const int64_t start = ow * n_.stride_w + tap % n_.kernel_w * n_.dilation_w - n_.pad_left;
    if (ih < 0 || ih >= n_.height) return;
    // The run's pixels whose tap lies inside the image: [low, high).
    int64_t low = start >= 0 ? 0 : (-start + n_.stride_w - 1) / n_.stride_w;
    int64_t high = start >= n_.width ? 0 : (n_.width - 1 - start) / n_.stride_w + 1;
    low = std::min(low, length);
    high = std::max(low, std::min(high, length));
    const int64_t step = n_.stride_w * n_.x_stride_w;
    // Where the row's first lane would lie.
    const int64_t origin = image * n_.x_stride_n + ih * n_.x_stride_h + start * n_.x_stride_w - place * step;
    for (int64_t lane = place + low; lane < place + high;) {
      const int64_t group = lane / kRowLanes, whole = (place + high) / kRowLanes - group;
      const int64_t source = origin + group * kRowLanes * step;
      begin_group(group);
      if (lane % kRowLanes == 0 && whole > 0) {
        parts_.back() = {source, kAllLanes, static_cast<int32_t>(whole)};
        group_ += whole - 1;
        lane += whole * kRowLanes;
        continue;
      }
      const int64_t end = std::min((group + 1) * kRowLanes, place + high);
      const int64_t first = lane - group * kRowLanes, last = end - group * kRowLanes;
      add_part(source, static_cast<int32_t>((1 << last) - (1 << first)));
      lane = end;
    }
  }

  // Goes on to a group; those between stay zero.
  void begin_group(int64_t group) {
    for (; group_ < group; ++group_) parts_.push_back({0, 0, 1});
  }

  void add_part(int64_t source, int32_t mask) {
    RowPart& part = parts_.back();
    if (part.mask == 0 || part.source == source) {
      part = {source, part.mask | mask, 1};
    } else {
      part.groups = 0;
      parts_.push_back({source, mask, 1});
    }
  }

  RowPrologue prologue(int64_t i) const {
    return {n_.in_scale ? n_.in_scale[i] : 1.f, n_.in_shift ? n_.in_shift[i] : 0.f, n_.in_relu};
  }

  void pack_row(int64_t unit, int64_t tap, float* row) const {
    const RowPart* parts = parts_.data() + first_part_[tap];
    const int64_t count = first_part_[tap + 1] - first_part_[tap], step = n_.stride_w * n_.x_stride_w;
    if (n_.pairs) {
      const int64_t i = 2 * unit;
      const bool both = i + 1 < n_.kept_in;
      const auto* x = reinterpret_cast<const uint16_t*>(n_.x);
      const uint16_t* second = both ? x + n_.channel(i + 1) * n_.x_stride_c : nullptr;
      RowPrologue prologues[2];
      if (n_.has_prologue) prologues[0] = prologue(i), prologues[1] = both ? prologue(i + 1) : RowPrologue{};
      micro::pack_pairs(parts, count, x + n_.channel(i) * n_.x_stride_c, second, step,
                        n_.has_prologue ? prologues : nullptr, row);
      return;
    }
    const RowPrologue applied = n_.has_prologue ? prologue(unit) : RowPrologue{};
    const RowPrologue* given = n_.has_prologue ? &applied : nullptr;
    const int64_t plane = n_.channel(unit) * n_.x_stride_c;
    if (n_.bfloat16) {
      micro::pack_row(parts, count, reinterpret_cast<const uint16_t*>(n_.x) + plane, step, given, row);
    } else {
      micro::pack_row(parts, count, reinterpret_cast<const float*>(n_.x) + plane, step, given, row);
    }
  }

  const NativeCall& n_;
  const int64_t groups_;
  int64_t group_ = -1;               // that the last part belongs to
  std::vector<RowPart> parts_;       // grouped by tap
  std::vector<int64_t> first_part_;  // of each tap, and the end
};

// Moves `count` pixels, numbered through the batch from `pixel`, between a tile's row and one channel's planes.
void move_pixels(const NativeCall& n, char* planes, int64_t channel, int64_t pixel, int64_t count, char* row,
                 bool out) {
  const int64_t area = n.out_h * n.out_w, size = n.out_size();
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
  const int64_t area = n.out_h * n.out_w, size = n.out_size();
  // Whole vectors for the tiles, and whole groups for the packing.
  const int64_t unit = std::max(lanes, kRowLanes), padded = (end - begin + unit - 1) / unit * unit;
  const int64_t tiles = (padded + width - 1) / width;
  // Odd multiples of a tile: a power of two between the panel's rows would leave them few sets of the L1 cache.
  const int64_t row = (tiles % 2 ? tiles : tiles + 1) * width;
  const int64_t units_per_block = reduction_block(n.depth, n.taps) / n.taps;
  const bool blocked = n.units > units_per_block;
  float* panel = thread_scratch(Scratch::kPixelPanel, std::min(units_per_block, n.units) * n.taps * row);
  float* partial =
      blocked ? thread_scratch(Scratch::kPartialSums, tiles * (last_panel - first_panel) * rows * width) : nullptr;
  const PanelPacker packer(n, begin, end, padded);
  const int64_t lines_per_unit = (end - begin) * n.stride_w * n.element_size() / 64 + 1;

  const int64_t full_panels = std::min(last_panel, n.kept_out / rows) - first_panel;
  constexpr int64_t kStraddleRow = 64 * micro::kMaxVectors;
  alignas(64) char straddle_out[micro::kMaxRows * kStraddleRow];
  alignas(64) char straddle_residual[micro::kMaxRows * kStraddleRow];
  TileArgs t{};
  t.panel_stride = row;
  t.weight_step = rows * n.depth;
  t.partial_step = rows * width;
  t.channel_step = rows;
  t.out_step = t.residual_step = rows * area * size;
  t.relu = n.out_relu;
  t.out_max = n.out_max;
  t.bfloat16 = n.out_bfloat16;
  for (int64_t unit = 0; unit < n.units; unit += units_per_block) {
    const int64_t last_unit = std::min(n.units, unit + units_per_block);
    packer.pack(unit, last_unit, row, panel);
    t.depth = (last_unit - unit) * n.taps;
    const bool more = last_unit < n.units, another = more || end < n.pixels();
    const int64_t next = more ? last_unit : 0, next_end = another ? std::min(n.units, next + units_per_block) : next;
    t.load_partial = unit > 0;
    t.store_partial = last_unit < n.units;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t pixel = begin + tile * width;
      const int vectors = padded - tile * width <= lanes ? 1 : 2;
      t.valid = static_cast<int32_t>(std::min<int64_t>(vectors * lanes, end - pixel));
      t.panel = panel + tile * width;
      const auto run = [&](int64_t first, int64_t count, int64_t tile_rows) {
        const int64_t channel = first * rows;
        t.tiles = static_cast<int32_t>(count);
        t.weight = weight + channel * n.depth + unit * n.taps * tile_rows;
        t.partial = partial + (tile * (last_panel - first_panel) + first - first_panel) * t.partial_step;
        t.scale = n.scale.empty() ? nullptr : n.scale.data() + channel;
        t.shift = n.shift.empty() ? nullptr : n.shift.data() + channel;
        const int64_t place = ((pixel / area * n.kept_out + channel) * area + pixel % area) * size;
        t.out = n.y + place;
        t.residual = n.residual ? n.residual + place : nullptr;
        t.out_row_stride = t.residual_row_stride = area * size;
        n.tiles->conv_nchw[tile_rows - 1][vectors - 1](t);
      };
      // Pixels of two or more images in one tile: computed beside the result and moved into it.
      const auto run_straddling = [&](int64_t p, int64_t tile_rows) {
        for (int64_t r = 0; n.residual && r < tile_rows; ++r) {
          move_pixels(n, const_cast<char*>(n.residual), p * rows + r, pixel, t.valid,
                      straddle_residual + r * kStraddleRow, false);
        }
        t.tiles = 1;
        t.weight = weight + p * rows * n.depth + unit * n.taps * tile_rows;
        t.partial = partial + (tile * (last_panel - first_panel) + p - first_panel) * t.partial_step;
        t.scale = n.scale.empty() ? nullptr : n.scale.data() + p * rows;
        t.shift = n.shift.empty() ? nullptr : n.shift.data() + p * rows;
        t.out = straddle_out;
        t.residual = n.residual ? straddle_residual : nullptr;
        t.out_row_stride = t.residual_row_stride = kStraddleRow;
        n.tiles->conv_nchw[tile_rows - 1][vectors - 1](t);
        for (int64_t r = 0; r < tile_rows; ++r) {
          move_pixels(n, n.y, p * rows + r, pixel, t.valid, straddle_out + r * kStraddleRow, true);
        }
      };
      const int64_t rest = last_panel - first_panel - full_panels;  // 0 or 1: the last panel with fewer rows
      if (pixel % area + t.valid > area && !t.store_partial) {
        for (int64_t p = first_panel; p < last_panel; ++p) run_straddling(p, std::min(rows, n.kept_out - p * rows));
      } else {
        // While a tile is computed, its share of what will be packed next comes closer, a few lines at a time.
        const int64_t from = next + (next_end - next) * tile / tiles,
                      to = next + (next_end - next) * (tile + 1) / tiles;
        const int64_t chunks = std::max<int64_t>(1, std::min(full_panels, (to - from) * lines_per_unit / kLinesAtOnce));
        for (int64_t c = 0; c < chunks; ++c) {
          for (int64_t u = from + (to - from) * c / chunks; u < from + (to - from) * (c + 1) / chunks; ++u) {
            packer.prefetch(u, more ? 0 : end - begin);
          }
          const int64_t p = full_panels * c / chunks, q = full_panels * (c + 1) / chunks;
          if (q > p) run(first_panel + p, q - p, rows);
        }
        if (rest > 0) run(last_panel - 1, 1, n.kept_out - (last_panel - 1) * rows);
      }
    }
  }
}

// Blocks of pixels for all threads, or groups of panels: whichever leaves a thread less to do. Threads that share out
// the panels all pack every pixel; those that share out the pixels all read every weight, and few tiles are seldom
// even.
TaskGrid task_grid(const GridShape& s) {
  const int64_t blocks = (s.tiles + s.tiles_per_block / 2) / s.tiles_per_block, threads = s.threads;
  const TaskGrid one{std::max<int64_t>(1, blocks), 1};
  if (threads == 1) return one;
  const TaskGrid by_channels{one.pixel_blocks, threads};
  const TaskGrid by_pixels{std::min(s.tiles, (one.pixel_blocks + threads - 1) / threads * threads), 1};
  const auto share = [&](int64_t count) { return (count + threads - 1) / threads; };
  const int64_t pixels = std::min(share(s.tiles) * s.tile_pixels, s.pixels);
  const int64_t filters = std::min(share(s.panels) * s.panel_filters, s.filters);
  const bool fewer = direct_cycles(s.pixels, filters, 1) < direct_cycles(pixels, s.filters, 1);
  return spread_grid(s, blocks < threads && s.panels >= threads && fewer ? by_channels : by_pixels);
}

}  // namespace

NativeTasks conv_nchw_tasks(const NativeCall& n, const float* weight) {
  const int64_t width = micro::kMaxVectors * n.tiles->lanes;
  const int64_t tiles = (n.pixels() + width - 1) / width, panels = (n.kept_out + n.tiles->rows - 1) / n.tiles->rows;
  const int64_t tiles_per_block =
      std::clamp<int64_t>(kPanelBytes / (std::min(n.depth, kReductionBlock) * width * 4), 5, 31);
  const TaskGrid grid =
      task_grid({tiles, panels, tiles_per_block, width, n.tiles->rows, n.pixels(), n.kept_out, n.depth, n.threads});
  return grid_tasks(n, grid, tiles, panels, width, n.tiles->rows,
                    [=, &n](int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel) {
                      run_task(n, weight, begin, end, first_panel, last_panel);
                    });
}

}  // namespace bap_kernels
