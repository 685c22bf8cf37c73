// Driver of Winograd convolutions: 3 x 3 taps, stride 1, dilation 1, float32, either layout.
//   y = A^T [ sum over listed channels i of (G w[j, i] G^T) * (B^T x[i] B) ] A      of overlapping tiles of x
// F(4 x 4) multiplies a quarter as often as the direct convolution, F(2 x 2) 4 / 9 as often.
//   block   a rectangle of tiles, or whole images: as many tiles as keep their transform in the L2 cache
//   1       the listed channels of the block's pixels, side by side: copied, or where they lie so already, in place
//   2       their transforms, once for all output channels
//   3       for each panel of output channels: one product of matrices for each point of a tile, and while the sums are
//           near, their transform with what is fused behind it; or each point's products for all panels first
// Tasks are blocks x groups of panels. No atomics; the order of each sum is fixed by the list, so results do not vary
// with the number of threads, the blocks, or the batch.
#include <algorithm>

#include "backends/cpu/isa.h"
#include "backends/cpu/microkernels/planes.h"
#include "backends/cpu/microkernels/winograd.h"
#include "backends/cpu/scratch.h"
#include "backends/cpu/winograd.h"
#include "backends/cpu/winograd_tiles.h"

namespace bap_kernels {
namespace {

using micro::WinogradTable;

// Bytes of a block's transforms, values and sums.
constexpr int64_t kBlockBytes = 640 * 1024;
constexpr int64_t kMostTiles = 128;
// Weights that come from an outer cache for every block are to serve so many tiles each time, even if the transforms
// then leave the L2 cache.
constexpr int64_t kFarWeightBytes = 8 * 1024 * 1024, kFewestTilesOfFar = 42;
// How far ahead of the weights that it reads, in floats, the first product of a point prefetches. Where weights come
// from an outer cache, the products of a point share out the next point's weights instead: each line has more time.
constexpr int64_t kWeightsAhead = 512, kNearWeightBytes = 384 * 1024;
// Point by point pays with so many channels and tiles, where an L2 cache holds no block's values beside the weights.
constexpr int64_t kChannelsByPoint = 64, kTilesByPoint = 24, kLanesByPoint = 8;
// Another cut is taken only where it ends so much sooner.
constexpr double kWorthwhile = 0.95;

// What all tasks of a call have in common.
struct Geometry {
  const WinogradTable* table;
  const micro::WinogradTransforms* transforms;
  int64_t size, edge, points;  // of results, of pixels, of pixels squared
  int64_t lanes, width;        // width of a panel
  int64_t panels, tile_rows, tile_columns;
  bool channels_last;
  TileSource source;
  std::vector<TileBlock> blocks;
  int64_t channel_groups;

  Geometry(const NativeCall& n, int64_t size_, bool last);
  double task_cycles(const NativeCall& n, int64_t task) const;

  // Whether all panels read a point's values before the next point's are read: each value then comes into the L1 cache
  // once, and the sums of all panels are kept until the last point. Otherwise panel by panel.
  bool point_by_point(const NativeCall& n, int64_t tiles) const {
    return lanes <= kLanesByPoint && n.kept_in >= kChannelsByPoint && tiles >= kTilesByPoint;
  }

  int64_t panel_width(const NativeCall& n, int64_t panel) const {
    return n.kept_out - panel * width <= lanes ? lanes : width;
  }
  const float* panel_weight(const NativeCall& n, const float* weight, int64_t panel) const {
    return weight + panel * width * n.kept_in * points;
  }

 private:
  void cut(const NativeCall& n, int64_t most, int64_t shared) {
    blocks = cut_tiles(n.batch, tile_rows, tile_columns, most, shared);
  }
  void share_out(const NativeCall& n);
  double cycles(const NativeCall& n, const TileBlock& block, int64_t filters) const;
};

Geometry::Geometry(const NativeCall& n, int64_t size_, bool last) {
  table = isa_winograd();
  transforms = &table->transforms[size_ == kWinogradLarge ? 0 : 1];
  size = size_;
  edge = size + 2;
  points = edge * edge;
  lanes = table->lanes;
  width = 2 * lanes;
  panels = ceil_div(n.kept_out, width);
  tile_rows = ceil_div(n.out_h, size);
  tile_columns = ceil_div(n.out_w, size);
  channels_last = last;
  const auto* pixels = reinterpret_cast<const float*>(n.x);
  source = {pixels,    n.x_stride_n, n.x_stride_c, n.x_stride_h, n.x_stride_w, n.height, n.width,
            n.pad_top, n.pad_left,   n.in_index,   n.kept_in,    size,         edge};
  if (!n.images.empty()) source.images = n.images.data();
  source.all_channels = n.channels_in;
  source.plan(n.has_prologue);
  share_out(n);
}

// Cycles of a block with a group of panels.
double Geometry::cycles(const NativeCall& n, const TileBlock& block, int64_t filters) const {
  const int64_t numbers = block.tiles() * points;
  return pass_cycles(2 * numbers * source.channels) + direct_cycles(numbers, filters, n.kept_in) -
         direct_cycles(numbers, 0, n.kept_in) + pass_cycles(numbers * filters);
}

double Geometry::task_cycles(const NativeCall& n, int64_t task) const {
  const int64_t group = task % channel_groups;
  const int64_t first = group * panels / channel_groups * width;
  const int64_t last = std::min(n.kept_out, (group + 1) * panels / channel_groups * width);
  return cycles(n, blocks[task / channel_groups], last - first);
}

// Blocks for all threads, or groups of panels that all transform the same pixels; for more threads than two both, where
// that ends sooner.
void Geometry::share_out(const NativeCall& n) {
  const bool far = 4 * points * n.kept_in * n.kept_out > kFarWeightBytes;
  const int64_t fewest = far ? kFewestTilesOfFar : table->rows;
  const int64_t most = std::clamp(kBlockBytes / (4 * points * (source.channels + width)), fewest, kMostTiles);
  const int64_t threads = n.threads, total = n.batch * tile_rows * tile_columns;
  channel_groups = threads > 1 && panels >= threads && total < 2 * table->rows * threads ? threads : 1;
  cut(n, most, channel_groups > 1 ? 1 : threads);
  if (threads <= 2) return;
  const auto last_done = [&] {
    double longest = 0;
    const int64_t count = static_cast<int64_t>(blocks.size()) * channel_groups, chunk = ceil_div(count, threads);
    for (int64_t first = 0; first < count; first += chunk) {
      double sum = 0;
      for (int64_t task = first; task < std::min(count, first + chunk); ++task) sum += task_cycles(n, task);
      longest = std::max(longest, sum);
    }
    return longest;
  };
  double least = kWorthwhile * last_done();
  auto best = std::pair(channel_groups, blocks);
  for (int64_t groups = 1; groups <= std::min(panels, threads); groups *= 2) {
    channel_groups = groups;
    cut(n, most, ceil_div(threads, groups));
    const double longest = last_done();
    if (longest < least) least = longest, best = {channel_groups, blocks};
  }
  std::tie(channel_groups, blocks) = std::move(best);
}

// One task: a block, and panels [first_panel, last_panel).
class Task {
 public:
  Task(const NativeCall& n, const Geometry& g, const TileBlock& block) : n_(n), g_(g), b_(block) {
    out_row_ = b_.first_row * g.size;
    out_column_ = b_.first_column * g.size;
    out_rows_ = std::min(n.out_h - out_row_, b_.rows * g.size);
    out_columns_ = std::min(n.out_w - out_column_, b_.columns * g.size);
  }

  void run(const float* weight, int64_t first_panel, int64_t last_panel) {
    transform_input();
    place_results();
    const int64_t tiles = b_.tiles(), sum_step = g_.points * g_.width, panels = last_panel - first_panel;
    const bool by_point = g_.point_by_point(n_, tiles);
    float* sums = thread_scratch(Scratch::kWinogradSums, (by_point ? panels : 1) * tiles * sum_step);
    for (int64_t point = 0; by_point && point < g_.points; ++point) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        const bool last = panel + 1 == panels;
        multiply(weight, first_panel + panel, point, sums + panel * tiles * sum_step,
                 point_weight(weight, first_panel + (last ? 0 : panel + 1), point + (last ? 1 : 0)));
      }
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      float* of_panel = sums + (by_point ? panel * tiles * sum_step : 0);
      for (int64_t point = 0; !by_point && point < g_.points; ++point) {
        multiply(weight, first_panel + panel, point, of_panel, point_weight(weight, first_panel + panel, point + 1));
      }
      transform_output(first_panel + panel, of_panel);
    }
  }

 private:
  void run_prologue(float* pixels, int64_t count) const {
    const auto padded = [&](const float* values) {
      std::vector<float> all(values ? g_.source.channels : 0, 0.f);
      if (values) std::copy_n(values, n_.kept_in, all.begin());
      return all;
    };
    const std::vector<float> scale = padded(n_.in_scale), shift = padded(n_.in_shift);
    g_.table->prologue({count, g_.source.channels, pixels, scale.empty() ? nullptr : scale.data(),
                        shift.empty() ? nullptr : shift.data(), n_.in_relu});
  }

  void transform_input() {
    const auto prologue = [this](float* pixels, int64_t count) {
      if (n_.has_prologue) run_prologue(pixels, count);
    };
    const std::vector<const float*> points = tile_points(g_.source, b_, prologue);
    const int64_t channels = g_.source.channels;
    channel_step_ = b_.tiles() * g_.lanes;
    point_step_ = point_step_of(channels, b_.tiles());
    float* values = thread_scratch(Scratch::kWinogradValues, g_.points * point_step_);
    g_.transforms->input({b_.tiles(), channels, points.data(), values, point_step_, channel_step_});
    values_ = values;
  }

  // A panel's last point is followed by the next panel.
  const float* point_weight(const float* weight, int64_t panel, int64_t point) const {
    return g_.panel_weight(n_, weight, panel) + point * n_.kept_in * g_.panel_width(n_, panel);
  }

  // The sums of one point and one panel, of all tiles; `next` is what is multiplied next.
  void multiply(const float* weight, int64_t panel, int64_t point, float* sums, const float* next) const {
    const int64_t width = g_.panel_width(n_, panel), tiles = b_.tiles(), sum_step = g_.points * g_.width;
    const float* w = point_weight(weight, panel, point);
    const int64_t parts = ceil_div(tiles, g_.table->rows);
    const bool shared = parts > 1 && 4 * g_.points * n_.kept_in * n_.kept_out > kNearWeightBytes;
    const int64_t step = shared ? ceil_div(width, parts) : width;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part * tiles / parts, rows = (part + 1) * tiles / parts - first;
      const float* ahead = shared ? next + part * n_.kept_in * width / parts : w + (part == 0 ? kWeightsAhead : 0);
      g_.table->product[rows - 1][width / g_.lanes - 1](
          {values_ + point * point_step_ + first * g_.lanes, channel_step_, w, n_.kept_in,
           sums + first * sum_step + point * g_.width, sum_step, ahead, step});
    }
  }

  // Numbers of the results' pixels: those of the whole result in channels_last, those of the block otherwise.
  void place_results() {
    places_.resize(b_.tiles() * g_.size * g_.size);
    int64_t* place = places_.data();
    for (int64_t image = 0; image < b_.images; ++image) {
      const int64_t base = g_.channels_last
                               ? (n_.image(b_.first_image + image) * n_.out_h + out_row_) * n_.out_w + out_column_
                               : image * out_rows_ * out_columns_;
      const int64_t row_step = g_.channels_last ? n_.out_w : out_columns_;
      for (int64_t tile_row = 0; tile_row < b_.rows; ++tile_row) {
        for (int64_t tile_column = 0; tile_column < b_.columns; ++tile_column) {
          for (int64_t i = tile_row * g_.size; i < (tile_row + 1) * g_.size; ++i) {
            for (int64_t j = tile_column * g_.size; j < (tile_column + 1) * g_.size; ++j) {
              *place++ = i < out_rows_ && j < out_columns_ ? base + i * row_step + j : -1;
            }
          }
        }
      }
    }
  }

  void transform_output(int64_t panel, const float* sums) const {
    const auto vectors = static_cast<int>(g_.panel_width(n_, panel) / g_.lanes);
    const int64_t channel = panel * g_.width, valid = std::min(n_.kept_out - channel, g_.width);
    auto* y = reinterpret_cast<float*>(n_.y);
    const auto* residual = reinterpret_cast<const float*>(n_.residual);
    micro::WinogradOutput t{};
    t.tiles = b_.tiles();
    t.sums = sums;
    t.places = places_.data();
    t.scale = n_.scale.empty() ? nullptr : n_.scale.data() + channel;
    t.shift = n_.shift.empty() ? nullptr : n_.shift.data() + channel;
    if (g_.channels_last) {
      t.out = y + channel;
      t.out_step = n_.kept_out;
      t.residual = residual ? residual + channel : nullptr;
      t.residual_step = n_.residual_pixel / 4;
      t.valid = valid;
      t.relu = n_.out_relu;
      t.out_max = n_.out_max;
      g_.transforms->output[vectors - 1](t);
      return;
    }
    const int64_t area = out_rows_ * out_columns_, image_area = n_.out_h * n_.out_w;
    t.out = thread_scratch(Scratch::kWinogradResults, b_.images * area * g_.width);
    t.out_step = g_.width;
    t.valid = vectors * g_.lanes;
    g_.transforms->output[vectors - 1](t);
    const bool joined = out_columns_ == n_.out_w;
    const int64_t runs = joined ? 1 : out_rows_, length = joined ? area : out_columns_;
    const float* in = t.out;
    for (int64_t image = b_.first_image; image < b_.first_image + b_.images; ++image) {
      for (int64_t run = 0; run < runs; ++run, in += length * g_.width) {
        const int64_t plane = n_.image(image) * n_.kept_out + channel;
        const int64_t place = plane * image_area + (out_row_ + run) * n_.out_w + out_column_;
        micro::pixels_to_planes(in, g_.width, valid, length, y + place, image_area,
                                residual ? residual + place : nullptr, n_.out_relu, n_.out_max);
      }
    }
  }

  const NativeCall& n_;
  const Geometry& g_;
  const TileBlock& b_;
  int64_t out_row_, out_rows_, out_column_, out_columns_;
  const float* values_ = nullptr;
  int64_t point_step_ = 0, channel_step_ = 0;
  std::vector<int64_t> places_;
};

}  // namespace

NativeTasks conv_winograd_tasks(const NativeCall& n, const float* weight, int64_t size, bool channels_last) {
  const auto g = std::make_shared<const Geometry>(n, size, channels_last);
  const auto run = [=, &n](int64_t number) {
    const int64_t group = number % g->channel_groups;
    Task(n, *g, g->blocks[number / g->channel_groups])
        .run(weight, group * g->panels / g->channel_groups, (group + 1) * g->panels / g->channel_groups);
  };
  NativeTasks tasks{static_cast<int64_t>(g->blocks.size()) * g->channel_groups, run, {}};
  if (TaskRecord::current() != nullptr) tasks.cycles = [=, &n](int64_t number) { return g->task_cycles(n, number); };
  return tasks;
}

}  // namespace bap_kernels
