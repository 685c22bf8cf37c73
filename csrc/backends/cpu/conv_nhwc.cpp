// Driver of channels_last results: tiles of output pixels x output channels.
//   y[pixel, j] = sum over taps and listed channels of x[pixel's tap, in_index[i]] * w[j, i, tap]
// A table of pointers names where each pixel's taps begin (see pixel_source.h), so stride, padding and dilation cost
// nothing in the kernel; padded taps point at zeros.
// Tasks are blocks of pixels x groups of weight panels. No atomics; the order of each sum is fixed by the reduction.
#include <algorithm>
#include <memory>

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

// One task: some of the output pixels x weight panels [first_panel, last_panel). Pixels are taken in blocks, whose
// channels are packed together where they are packed at all; every pass of the reduction visits all tiles of a block.
class Task {
 public:
  Task(const NativeCall& n, const PixelAccess& access, const Reduction& reduction, const float* weight,
       int64_t first_panel, int64_t last_panel)
      : n_(n),
        access_(access),
        reduction_(reduction),
        weight_(weight),
        source_(n, access),
        rows_(n.tiles->rows),
        lanes_(n.tiles->lanes),
        width_(micro::kMaxVectors * lanes_),
        row_bytes_(n.kept_out * n.out_size()),
        first_panel_(first_panel),
        panels_(last_panel - first_panel),
        full_panels_(std::min(last_panel, n.kept_out / width_) - first_panel) {
    int64_t steps = 0;
    for (const auto& pass : reduction.blocks) steps = std::max(steps, pass.steps);
    const bool near = steps * panels_ * width_ * int64_t{4} <= kWeightsNear;
    order_ = !near ? Order::kPanelByPanel : source_.stream_step() ? Order::kStream : Order::kTileByTile;
    t_.row_stride = static_cast<int32_t>(rows_);
    t_.out_row_stride = row_bytes_;
    t_.residual_row_stride = n.residual_pixel;
    t_.offsets = source_.offsets();
    t_.relu = n.out_relu;
    t_.out_max = n.out_max;
    t_.bfloat16 = n.out_bfloat16;
  }

  // Output pixels [begin, end).
  void run(int64_t begin, int64_t end) {
    int64_t pixels = end - begin;
    if (order_ == Order::kStream) pixels = std::max<int64_t>(1, kPixelsNear / (source_.stream_step() * rows_)) * rows_;
    if (order_ == Order::kPanelByPanel && n_.taps == 1 && !access_.direct) {
      pixels = std::max<int64_t>(2, kPackedBytes / (access_.pixel_floats * 4 * rows_)) * rows_;
    }
    for (int64_t first = begin; first < end; first += pixels) {
      weights_read_ = first > begin;
      run_block(first, std::min(end, first + pixels));
    }
  }

 private:
  enum class Along { kTiles, kPanels };

  void run_block(int64_t begin, int64_t end) {
    begin_ = begin, end_ = end;
    full_tiles_ = (end - begin) / rows_, last_rows_ = (end - begin) % rows_;
    const int64_t tiles = ceil_div(end - begin, rows_);
    table_ = reinterpret_cast<const float**>(thread_scratch(Scratch::kPixelPointers, tiles * access_.runs * rows_ * 2));
    source_.pointers(begin, end, rows_, table_);
    const bool several = reduction_.blocks.size() > 1;
    partial_ = several ? thread_scratch(Scratch::kPartialSums, tiles * panels_ * rows_ * width_) : nullptr;
    for (size_t pass = 0; pass < reduction_.blocks.size(); ++pass) {
      pass_ = &reduction_.blocks[pass];
      t_.segments = reduction_.segments.data() + pass_->first_segment;
      t_.segment_count = static_cast<int32_t>(pass_->segments);
      t_.load_partial = pass > 0;
      t_.store_partial = pass + 1 < reduction_.blocks.size();
      if (order_ == Order::kPanelByPanel) {
        panel_by_panel();
      } else if (order_ == Order::kTileByTile) {
        tile_by_tile();
      } else {
        stream();
      }
    }
  }

  // `count` tiles of `tile_rows` pixels from (tile, panel) on, the next tile or the next panel each time. Panels are
  // counted from the task's first one.
  void run_tiles(int64_t tile, int64_t tile_rows, int64_t panel, int64_t count, Along along) {
    const int64_t channel = (first_panel_ + panel) * width_;
    const int vectors = n_.kept_out - channel <= lanes_ ? 1 : 2;
    t_.tiles = static_cast<int32_t>(count);
    t_.weight = weights(panel);
    t_.valid = static_cast<int32_t>(std::min<int64_t>(n_.kept_out - channel, vectors * lanes_));
    t_.scale = n_.scale.empty() ? nullptr : n_.scale.data() + channel;
    t_.shift = n_.shift.empty() ? nullptr : n_.shift.data() + channel;
    t_.source = table_ + tile * access_.runs * rows_;
    t_.partial = partial_ + (tile * panels_ + panel) * rows_ * width_;
    const int64_t pixel = begin_ + tile * rows_, first_byte = channel * n_.out_size();
    t_.out = n_.y + pixel * row_bytes_ + first_byte;
    t_.residual = n_.residual ? n_.residual + pixel * n_.residual_pixel + first_byte : nullptr;
    const bool along_panels = along == Along::kPanels;
    t_.weight_step = along_panels ? width_ * n_.depth : 0;
    t_.source_step = along_panels ? 0 : access_.runs * rows_;
    t_.partial_step = (along_panels ? 1 : panels_) * rows_ * width_;
    t_.channel_step = along_panels ? width_ : 0;
    t_.out_step = along_panels ? width_ * n_.out_size() : rows_ * row_bytes_;
    t_.residual_step = along_panels ? t_.out_step : rows_ * n_.residual_pixel;
    n_.tiles->conv_nhwc[tile_rows - 1][vectors - 1](t_);
  }

  // The same where the weights come from an outer cache: the kernel asks for them in advance.
  void run_far_tiles(int64_t tile, int64_t tile_rows, int64_t panel, int64_t count, Along along) {
    const char* before = t_.ahead;
    t_.ahead = reinterpret_cast<const char*>(weights(panel)) + kWeightsAhead;
    run_tiles(tile, tile_rows, panel, count, along);
    t_.ahead = before;
  }

  // What the pass reads of a panel's weights.
  const float* weights(int64_t panel) const {
    const int64_t channel = (first_panel_ + panel) * width_;
    return weight_ + channel * n_.depth + pass_->first_step * (n_.kept_out - channel <= lanes_ ? lanes_ : width_);
  }

  void panel_by_panel() {
    for (int64_t panel = 0; panel < panels_; ++panel) {
      if (full_tiles_ > 0) run_far_tiles(0, rows_, panel, 1, Along::kTiles);
      if (full_tiles_ > 1) run_tiles(1, rows_, panel, full_tiles_ - 1, Along::kTiles);
      if (last_rows_ > 0) run_tiles(full_tiles_, last_rows_, panel, 1, Along::kTiles);
    }
  }

  // While a tile is computed, the next one's pixels come closer, a few lines at a time.
  void tile_by_tile() {
    const int64_t tiles = ceil_div(end_ - begin_, rows_);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t tile_rows = std::min(rows_, end_ - begin_ - tile * rows_);
      const bool far = !weights_read_ && tile == 0;
      const bool ahead = pass_ == reduction_.blocks.data() && tile + 1 < full_tiles_;
      const int64_t chunks =
          ahead ? std::max<int64_t>(1, std::min(full_panels_, source_.lines(rows_) / kLinesAtOnce)) : 1;
      for (int64_t c = 0; c < chunks; ++c) {
        const float* const* next = table_ + (tile + 1) * access_.runs * rows_;
        if (ahead) source_.prefetch(next, rows_ * c / chunks, rows_ * (c + 1) / chunks);
        const int64_t panel = full_panels_ * c / chunks, count = full_panels_ * (c + 1) / chunks - panel;
        if (count == 0) continue;
        if (far) {
          run_far_tiles(tile, tile_rows, panel, count, Along::kPanels);
        } else {
          run_tiles(tile, tile_rows, panel, count, Along::kPanels);
        }
      }
      if (full_panels_ < panels_) run_tiles(tile, tile_rows, full_panels_, 1, Along::kPanels);
    }
  }

  // While a block is computed, the kernel prefetches the next block's pixels, then the lines of its results.
  void stream() {
    const int64_t coming = std::min(end_ - begin_, n_.pixels() - end_);
    t_.out_near = out_near_;
    out_near_ = false;
    int64_t panel = 0;
    if (full_tiles_ > 0 && coming > 0) {
      if (pass_ == reduction_.blocks.data()) stream_ahead(panel, source_.stream(end_), coming * source_.stream_step());
      const bool whole_rows = panels_ * width_ >= n_.kept_out;
      if (!t_.store_partial && panel < full_panels_ && whole_rows) {
        out_near_ = stream_ahead(panel, n_.y + end_ * row_bytes_, coming * row_bytes_);
      }
    }
    if (full_tiles_ > 0 && panel < full_panels_) stream_panels(panel, full_panels_ - panel);
    if (full_tiles_ > 0 && full_panels_ < panels_) run_tiles(0, rows_, full_panels_, full_tiles_, Along::kTiles);
    if (last_rows_ > 0 && full_panels_ > 0) run_tiles(full_tiles_, last_rows_, 0, full_panels_, Along::kPanels);
    if (last_rows_ > 0 && full_panels_ < panels_) run_tiles(full_tiles_, last_rows_, full_panels_, 1, Along::kPanels);
  }

  int64_t pass_bytes() const { return pass_->steps * width_ * int64_t{4}; }  // of a panel's weights

  // All whole tiles of the block with `count` panels from `panel` on, which moves on.
  void stream_panels(int64_t& panel, int64_t count) {
    if (full_tiles_ == 1) {
      run_tiles(0, rows_, panel, count, Along::kPanels);
      panel += count;
      return;
    }
    const int64_t far = weights_read_ ? 0 : 1;
    for (const int64_t end = panel + count; panel < end; ++panel) {
      if (far) run_far_tiles(0, rows_, panel, 1, Along::kTiles);
      run_tiles(far, rows_, panel, full_tiles_ - far, Along::kTiles);
      if (t_.ahead) t_.ahead += (full_tiles_ - far) * pass_bytes();
    }
  }

  // Runs panels whose tiles prefetch `memory`: a step of the reduction asks for one line, width * 4 bytes behind that
  // of the step before; further panels ask for the lines between. Returns whether all lines were asked for.
  bool stream_ahead(int64_t& panel, const char* memory, int64_t bytes) {
    const int64_t most = ceil_div(bytes, full_tiles_ * pass_bytes());
    bool all = true;
    for (int64_t line = 0; line < width_ * 4; line += 64) {
      const int64_t count = std::min(most, full_panels_ - panel);
      t_.ahead = memory + line;
      if (count > 0) stream_panels(panel, count);
      all = all && count == most;
    }
    t_.ahead = nullptr;
    return all;
  }

  const NativeCall& n_;
  const PixelAccess& access_;
  const Reduction& reduction_;
  const float* weight_;
  PixelSource source_;
  const int64_t rows_, lanes_, width_;  // of a whole tile, of a vector, of a panel
  const int64_t row_bytes_;             // of a pixel's results
  const int64_t first_panel_, panels_, full_panels_;
  Order order_;
  bool weights_read_ = false;  // by an earlier block
  bool out_near_ = false;      // the next block's results have been asked for

  // The current block, and its current pass of the reduction.
  int64_t begin_ = 0, end_ = 0, full_tiles_ = 0, last_rows_ = 0;
  const float** table_ = nullptr;
  float* partial_ = nullptr;
  const Reduction::Block* pass_ = nullptr;
  TileArgs t_{};
};

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

RangeRun conv_nhwc_pixels(const NativeCall& n, const float* weight) {
  struct State {
    PixelAccess access;
    Reduction reduction;
    Task task;
    State(const NativeCall& n, const float* weight)
        : access(n),
          reduction(access),
          task(n, access, reduction, weight, 0, ceil_div(n.kept_out, micro::kMaxVectors * n.tiles->lanes)) {}
  };
  const auto state = std::make_shared<State>(n, weight);
  const int64_t most = state->access.direct ? kPixelsPerBlock : kPixelsPerPackedBlock;
  return [=](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; pixel += most) state->task.run(pixel, std::min(end, pixel + most));
  };
}

NativeTasks conv_nhwc_tasks(const NativeCall& n, const float* weight) {
  const PixelAccess access(n);
  const int64_t rows = n.tiles->rows, width = micro::kMaxVectors * n.tiles->lanes;
  const int64_t tiles = (n.pixels() + rows - 1) / rows, panels = (n.kept_out + width - 1) / width;
  const TaskGrid grid = task_grid({tiles, panels, (access.direct ? kPixelsPerBlock : kPixelsPerPackedBlock) / rows,
                                   rows, width, n.pixels(), n.kept_out, n.depth, n.threads});
  return grid_tasks(
      n, grid, tiles, panels, rows, width,
      [=, &n, reduction = Reduction(access)](int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel) {
        Task(n, access, reduction, weight, first_panel, last_panel).run(begin, end);
      });
}

}  // namespace bap_kernels
