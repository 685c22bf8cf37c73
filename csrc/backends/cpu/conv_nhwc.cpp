// Driver of channels_last results: tiles of output pixels x output channels.
//   y[pixel, j] = sum over taps and listed channels of x[pixel's tap, in_index[i]] * w[j, i, tap]
// A table of pointers names where each pixel's taps begin (see pixel_source.h), so stride, padding and dilation cost
// nothing in the kernel; padded taps point at zeros.
// Tasks are blocks of pixels x groups of weight panels. No atomics; the order of each sum is fixed by the reduction.
#include <algorithm>

#include "backends/cpu/native_call.h"
#include "backends/cpu/pixel_source.h"
#include "backends/cpu/scratch.h"

namespace bap_kernels {
namespace {

using micro::Segment;
using micro::TileArgs;

constexpr int64_t kPixelsPerBlock = 120;
// Blocks that pack image rows share fewer of them with their neighbours when they are larger.
constexpr int64_t kPixelsPerPackedBlock = 240;
// Weights of one reduction block up to this size stay in the L2 cache, so a tile can visit all of them in turn.
constexpr int64_t kWeightsNear = 192 * 1024;
// More prefetches than a core tracks at once would stall it.
constexpr int64_t kLinesAtOnce = 16;
// Bytes between the weights that a tile reads and those that it prefetches.
constexpr int64_t kWeightsAhead = 2048;
// Bytes of pixels in a block of kStream.
constexpr int64_t kPixelsNear = 64 * 1024;

// Packed pixels that stay in the L2 cache beside a panel of weights.
constexpr int64_t kPackedBytes = 128 * 1024;

// The order of the tiles of a block.
enum class Order {
  kPanelByPanel,  // all pixels with one panel of weights, then the next panel
  kTileByTile,    // all panels with one tile of pixels, then the next tile: the panels stay in the cache
  kStream,        // panel by panel over small blocks of adjacent pixels: pixels and panels stay in the cache, and
                  // the next block's pixels are prefetched
};

// The reduction cut into blocks of about equal length, each a run of segments.
struct Reduction {
  struct Block {
    int64_t first_segment, segments, first_step, steps;
  };
  std::vector<Segment> segments;
  std::vector<Block> blocks;

  explicit Reduction(const PixelAccess& access) {
    const int64_t most = reduction_block(access.runs * access.steps, 1);
    int64_t step = 0, room = 0;
    for (int64_t run = 0; run < access.runs; ++run) {
      for (int64_t begin = 0; begin < access.steps;) {
        if (room == 0) {
          blocks.push_back({static_cast<int64_t>(segments.size()), 0, step, 0});
          room = most;
        }
        const int64_t count = std::min(room, access.steps - begin);
        segments.push_back({static_cast<int32_t>(run), static_cast<int32_t>(begin), static_cast<int32_t>(count)});
        ++blocks.back().segments;
        blocks.back().steps += count;
        begin += count;
        room -= count;
        step += count;
      }
    }
  }
};

// Output pixels [begin, end), whose channels are packed together where they are packed at all, x weight panels
// [first_panel, last_panel). `first`: nothing has read the weights before.
void run_block(const NativeCall& n, const PixelAccess& access, const Reduction& reduction, PixelSource& source,
               const float* weight, Order order, bool first, bool& out_near, int64_t begin, int64_t end,
               int64_t first_panel, int64_t last_panel) {
  const int64_t rows = n.tiles->rows, lanes = n.tiles->lanes, width = micro::kMaxVectors * lanes;
  const int64_t tiles = (end - begin + rows - 1) / rows, panels = last_panel - first_panel;
  auto** table =
      reinterpret_cast<const float**>(thread_scratch(Scratch::kPixelPointers, tiles * access.runs * rows * 2));
  source.pointers(begin, end, rows, table);
  const bool blocked = reduction.blocks.size() > 1;
  float* partial =
      blocked ? thread_scratch(Scratch::kPartialSums, tiles * (last_panel - first_panel) * rows * width) : nullptr;
  const int64_t row_bytes = n.kept_out * n.out_size();
  const int64_t full_tiles = (end - begin) / rows, last_rows = (end - begin) % rows;

  TileArgs t{};
  t.row_stride = static_cast<int32_t>(rows);
  t.out_row_stride = row_bytes;
  t.residual_row_stride = n.residual_pixel;
  t.offsets = source.offsets();
  t.relu = n.out_relu;
  t.out_max = n.out_max;
  t.bfloat16 = n.out_bfloat16;
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
      t.source = table + tile * access.runs * rows;
      t.partial = partial + (tile * panels + panel - first_panel) * rows * width;
      const int64_t pixel = begin + tile * rows, first_byte = channel * n.out_size();
      t.out = n.y + pixel * row_bytes + first_byte;
      t.residual = n.residual ? n.residual + pixel * n.residual_pixel + first_byte : nullptr;
      t.weight_step = along_panels ? width * n.depth : 0;
      t.source_step = along_panels ? 0 : access.runs * rows;
      t.partial_step = (along_panels ? 1 : panels) * rows * width;
      t.channel_step = along_panels ? width : 0;
      t.out_step = along_panels ? width * n.out_size() : rows * row_bytes;
      t.residual_step = along_panels ? t.out_step : rows * n.residual_pixel;
      n.tiles->conv_nhwc[tile_rows - 1][vectors - 1](t);
    };
    // The same where the panels come from an outer cache: the kernel asks for them in advance.
    const auto run_far = [&](int64_t tile, int64_t tile_rows, int64_t panel, int64_t count, bool along_panels) {
      const int64_t channel = panel * width, vectors = n.kept_out - channel <= lanes ? 1 : 2;
      const char* before = t.ahead;
      t.ahead = reinterpret_cast<const char*>(weight + channel * n.depth + block.first_step * vectors * lanes) +
                kWeightsAhead;
      run(tile, tile_rows, panel, count, along_panels);
      t.ahead = before;
    };
    const int64_t full_panels = std::min(last_panel, n.kept_out / width) - first_panel;
    if (order == Order::kPanelByPanel) {
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        // The first tile finds the panel in an outer cache and asks for it in advance.
        if (full_tiles > 0) run_far(0, rows, panel, 1, false);
        if (full_tiles > 1) run(1, rows, panel, full_tiles - 1, false);
        if (last_rows > 0) run(full_tiles, last_rows, panel, 1, false);
      }
    } else if (order == Order::kStream) {
      // While a block is computed, the kernel prefetches the next block's pixels, then the lines of its results.
      const int64_t coming = std::min(end - begin, n.pixels() - end);
      const int64_t panel_bytes = block.steps * width * int64_t{4};  // of one tile
      int64_t panel = 0;
      const auto run_panels = [&](int64_t count) {
        if (full_tiles == 1) {
          run(0, rows, first_panel + panel, count, true);
        } else {
          const int64_t far = first ? 1 : 0;
          for (int64_t p = first_panel + panel; p < first_panel + panel + count; ++p) {
            if (first) run_far(0, rows, p, 1, false);
            run(far, rows, p, full_tiles - far, false);
            if (t.ahead) t.ahead += (full_tiles - far) * panel_bytes;
          }
        }
        panel += count;
      };
      // Runs panels whose tiles prefetch `memory`: a step of the reduction asks for one line, width * 4 bytes behind
      // that of the step before; further panels ask for the lines between. Returns whether all lines were asked for.
      const auto prefetch = [&](const char* memory, int64_t bytes) {
        const int64_t one = full_tiles * panel_bytes, most = (bytes + one - 1) / one;
        bool all = true;
        for (int64_t line = 0; line < width * 4; line += 64) {
          const int64_t count = std::min(most, full_panels - panel);
          t.ahead = memory + line;
          if (count > 0) run_panels(count);
          all = all && count == most;
        }
        t.ahead = nullptr;
        return all;
      };
      t.out_near = out_near;
      out_near = false;
      if (full_tiles > 0 && coming > 0) {
        if (b == 0) prefetch(source.stream(end), coming * source.stream_step());
        if (!t.store_partial && panel < full_panels && first_panel == 0 && last_panel * width >= n.kept_out) {
          out_near = prefetch(n.y + end * row_bytes, coming * row_bytes);
        }
      }
      if (full_tiles > 0 && panel < full_panels) run_panels(full_panels - panel);
      if (full_tiles > 0 && full_panels < panels) run(0, rows, last_panel - 1, full_tiles, false);
      if (last_rows > 0 && full_panels > 0) run(full_tiles, last_rows, first_panel, full_panels, true);
      if (last_rows > 0 && full_panels < panels) run(full_tiles, last_rows, last_panel - 1, 1, true);
    } else {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t tile_rows = std::min(rows, end - begin - tile * rows);
        // While a tile is computed, the next one's pixels come closer, a few lines at a time.
        const bool ahead = b == 0 && tile + 1 < full_tiles;
        const float* const* next = table + (tile + 1) * access.runs * rows;
        const int64_t chunks =
            ahead ? std::max<int64_t>(1, std::min(full_panels, source.lines(rows) / kLinesAtOnce)) : 1;
        for (int64_t c = 0; c < chunks; ++c) {
          if (ahead) source.prefetch(next, rows * c / chunks, rows * (c + 1) / chunks);
          const int64_t p = full_panels * c / chunks, q = full_panels * (c + 1) / chunks;
          if (q > p && first && tile == 0) run_far(tile, tile_rows, first_panel + p, q - p, true);
          if (q > p && !(first && tile == 0)) run(tile, tile_rows, first_panel + p, q - p, true);
        }
        if (full_panels < panels) run(tile, tile_rows, last_panel - 1, 1, true);
      }
    }
  }
}

// One task: output pixels [begin, end), weight panels [first_panel, last_panel).
void run_task(const NativeCall& n, const PixelAccess& access, const Reduction& reduction, const float* weight,
              int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel) {
  PixelSource source(n, access);
  int64_t steps = 0;
  for (const auto& block : reduction.blocks) steps = std::max(steps, block.steps);
  const int64_t rows = n.tiles->rows, width = micro::kMaxVectors * n.tiles->lanes;
  const bool near = steps * (last_panel - first_panel) * width * int64_t{4} <= kWeightsNear;
  const Order order = !near ? Order::kPanelByPanel : source.stream_step() ? Order::kStream : Order::kTileByTile;
  int64_t pixels = end - begin;
  if (order == Order::kStream) pixels = std::max<int64_t>(1, kPixelsNear / (source.stream_step() * rows)) * rows;
  if (order == Order::kPanelByPanel && n.taps == 1 && !access.direct) {
    pixels = std::max<int64_t>(2, kPackedBytes / (access.pixel_floats * 4 * rows)) * rows;
  }
  bool out_near = false;
  for (int64_t first = begin; first < end; first += pixels) {
    run_block(n, access, reduction, source, weight, order, first == begin, out_near, first,
              std::min(end, first + pixels), first_panel, last_panel);
  }
}

// Enough tasks for all threads, weights read as seldom as possible.
TaskGrid task_grid(const GridShape& s) {
  TaskGrid grid{std::max<int64_t>(1, (s.tiles + s.tiles_per_block / 2) / s.tiles_per_block), 1};
  if (s.threads == 1) return grid;
  // With few pixels, sharing out the channels reads each weight once; sharing out the pixels would read it by each
  // thread.
  if (s.tiles < s.tiles_per_block * s.threads / 2 && s.panels >= s.threads) {
    grid.channel_groups = s.threads;
  } else {
    const int64_t rounds = (grid.pixel_blocks + s.threads - 1) / s.threads;
    grid.pixel_blocks = std::min(s.tiles, rounds * s.threads);
  }
  return spread_grid(s, grid);
}

}  // namespace

NativeTasks conv_nhwc_tasks(const NativeCall& n, const float* weight) {
  const PixelAccess access(n);
  const int64_t rows = n.tiles->rows, width = micro::kMaxVectors * n.tiles->lanes;
  const int64_t tiles = (n.pixels() + rows - 1) / rows, panels = (n.kept_out + width - 1) / width;
  const TaskGrid grid = task_grid({tiles, panels, (access.direct ? kPixelsPerBlock : kPixelsPerPackedBlock) / rows,
                                   rows, width, n.pixels(), n.kept_out, n.depth, n.threads});
  return grid_tasks(
      n, grid, tiles, panels, rows, width,
      [=, &n, reduction = Reduction(access)](int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel) {
        run_task(n, access, reduction, weight, begin, end, first_panel, last_panel);
      });
}

}  // namespace bap_kernels
