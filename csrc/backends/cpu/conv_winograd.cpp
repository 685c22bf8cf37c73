// Driver of Winograd convolutions: 3 x 3 taps, stride 1, dilation 1, float32, either layout.
//   y = A^T [ sum over listed channels i of (G w[j, i] G^T) * (B^T x[i] B) ] A      of overlapping tiles of x
// F(4 x 4) multiplies a quarter as often as the direct convolution, F(2 x 2) 4 / 9 as often.
//   block   a rectangle of tiles, or whole images: as many tiles as keep their transform in the L2 cache
//   1       the listed channels of the block's pixels, side by side: copied, or where they lie so already, in place
//   2       their transforms, once for all output channels
//   3       for each panel of output channels: one product of matrices for each point of a tile, and while the sums are
//           near, their transform with what is fused behind it
// Tasks are blocks x groups of panels. No atomics; the order of each sum is fixed by the list, so results do not vary
// with the number of threads, the blocks, or the batch.
#include <algorithm>

#include "backends/cpu/isa.h"
#include "backends/cpu/microkernels/planes.h"
#include "backends/cpu/microkernels/winograd.h"
#include "backends/cpu/winograd.h"

namespace bap_kernels {
namespace {

using micro::WinogradTable;

// Slots of thread_scratch; the drivers of direct convolutions and the gradients have those before.
constexpr int kValueSlot = 4, kSumSlot = 5, kPixelSlot = 6, kResultSlot = 7;
// Bytes of a block's transforms, values and sums.
constexpr int64_t kBlockBytes = 640 * 1024;
constexpr int64_t kMostTiles = 128;
// Weights that come from an outer cache for every block are to serve so many tiles each time, even if the transforms
// then leave the L2 cache.
constexpr int64_t kFarWeightBytes = 8 * 1024 * 1024, kFewestTilesOfFar = 42;
// A block may exceed the limit by a quarter rather than be cut.
constexpr double kOvershoot = 1.25;
// Another cut is taken only where it ends so much sooner.
constexpr double kWorthwhile = 0.95;

// Tiles of a block: rows and columns of tiles of consecutive images.
struct Block {
  int64_t first_image, images, first_row, rows, first_column, columns;
  int64_t tiles() const { return images * rows * columns; }
};

// What all tasks of a call have in common.
struct Geometry {
  const WinogradTable* table;
  const micro::WinogradTransforms* transforms;
  int64_t size, edge, points;      // of results, of pixels, of pixels squared
  int64_t lanes, width, channels;  // width of a panel; kept_in as whole vectors, and whole groups of planes
  int64_t panels, tile_rows, tile_columns;
  bool channels_last, in_place;
  std::vector<micro::GatherMove> moves;
  std::vector<Block> blocks;
  int64_t channel_groups;

  Geometry(const NativeCall& n, int64_t size_, bool last);
  double task_cycles(const NativeCall& n, int64_t task) const;

  int64_t panel_width(const NativeCall& n, int64_t panel) const {
    return n.kept_out - panel * width <= lanes ? lanes : width;
  }
  const float* panel_weight(const NativeCall& n, const float* weight, int64_t panel) const {
    return weight + panel * width * n.kept_in * points;
  }

 private:
  void cut(const NativeCall& n, int64_t most, int64_t shared);
  void share_out(const NativeCall& n);
  void find_moves(const NativeCall& n);
  double cycles(const NativeCall& n, const Block& block, int64_t filters) const;
};

Geometry::Geometry(const NativeCall& n, int64_t size_, bool last) {
  table = isa_winograd();
  transforms = &table->transforms[size_ == kWinogradLarge ? 0 : 1];
  size = size_;
  edge = size + 2;
  points = edge * edge;
  lanes = table->lanes;
  width = 2 * lanes;
  channels = round_up(n.kept_in, std::max(lanes, micro::kPlaneChannels));
  panels = ceil_div(n.kept_out, width);
  tile_rows = ceil_div(n.out_h, size);
  tile_columns = ceil_div(n.out_w, size);
  channels_last = last;
  in_place = !n.in_index && !n.has_prologue && n.x_stride_c == 1 && channels == n.kept_in;
  if (table->gather_moves && n.in_index && n.x_stride_c == 1) find_moves(n);
  share_out(n);
}

// A list in order has at most as many moves as it and the channels have vectors.
void Geometry::find_moves(const NativeCall& n) {
  for (int64_t first = 0; first < n.kept_in; first += lanes) {
    const size_t own = moves.size();
    for (int64_t lane = 0; lane < std::min(lanes, n.kept_in - first); ++lane) {
      const auto chunk = static_cast<int32_t>(n.in_index[first + lane] / lanes);
      auto move = std::find_if(moves.begin() + own, moves.end(), [&](const auto& m) { return m.chunk == chunk; });
      if (move == moves.end()) move = moves.insert(move, {chunk, 0, 0, false});
      move->from |= static_cast<uint16_t>(1u << n.in_index[first + lane] % lanes);
      move->to |= static_cast<uint16_t>(1u << lane);
    }
    moves.back().last = true;
  }
}

// Cycles of a block with a group of panels.
double Geometry::cycles(const NativeCall& n, const Block& block, int64_t filters) const {
  const int64_t numbers = block.tiles() * points;
  return pass_cycles(2 * numbers * channels) + direct_cycles(numbers, filters, n.kept_in) -
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
  const int64_t most = std::clamp(kBlockBytes / (4 * points * (channels + width)), fewest, kMostTiles);
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

// Into blocks of at most so many tiles, their number a multiple of `shared` where that is possible.
void Geometry::cut(const NativeCall& n, int64_t most, int64_t shared) {
  const int64_t per_image = tile_rows * tile_columns;
  blocks.clear();
  if (static_cast<double>(per_image) <= kOvershoot * static_cast<double>(most) && n.batch >= shared) {
    int64_t count = ceil_div(n.batch, std::max<int64_t>(1, most / per_image));
    count = std::min(n.batch, round_up(count, shared));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = i * n.batch / count, end = (i + 1) * n.batch / count;
      blocks.push_back({first, end - first, 0, tile_rows, 0, tile_columns});
    }
    return;
  }
  int64_t column_parts = ceil_div(tile_columns, most);
  const int64_t rows = std::max<int64_t>(1, most / ceil_div(tile_columns, column_parts));
  int64_t row_parts = ceil_div(tile_rows, rows);
  while (row_parts < tile_rows && n.batch * row_parts * column_parts % shared != 0) ++row_parts;
  // For many threads rows of tiles may be too few.
  while (shared > 2 && n.batch * row_parts * column_parts < shared && column_parts < tile_columns) ++column_parts;
  for (int64_t image = 0; image < n.batch; ++image) {
    for (int64_t r = 0; r < row_parts; ++r) {
      const int64_t first_row = r * tile_rows / row_parts, end_row = (r + 1) * tile_rows / row_parts;
      for (int64_t c = 0; c < column_parts; ++c) {
        const int64_t first = c * tile_columns / column_parts, end = (c + 1) * tile_columns / column_parts;
        blocks.push_back({image, 1, first_row, end_row - first_row, first, end - first});
      }
    }
  }
}

const float* zeros(int64_t count) {
  thread_local std::vector<float> values;
  if (static_cast<int64_t>(values.size()) < count) values.assign(count, 0.f);
  return values.data();
}

// One task: a block, and panels [first_panel, last_panel).
class Task {
 public:
  Task(const NativeCall& n, const Geometry& g, const Block& block) : n_(n), g_(g), b_(block) {
    const auto range = [&](int64_t first, int64_t count, int64_t pad, int64_t limit) {
      const int64_t begin = std::clamp<int64_t>(first * g.size - pad, 0, limit);
      const int64_t end = std::clamp<int64_t>((first + count) * g.size + 2 - pad, begin, limit);
      return std::pair(begin, end - begin);
    };
    std::tie(in_row_, in_rows_) = range(b_.first_row, b_.rows, n.pad_top, n.height);
    std::tie(in_column_, in_columns_) = range(b_.first_column, b_.columns, n.pad_left, n.width);
    out_row_ = b_.first_row * g.size;
    out_column_ = b_.first_column * g.size;
    out_rows_ = std::min(n.out_h - out_row_, b_.rows * g.size);
    out_columns_ = std::min(n.out_w - out_column_, b_.columns * g.size);
  }

  void run(const float* weight, int64_t first_panel, int64_t last_panel) {
    transform_input();
    place_results();
    const int64_t tiles = b_.tiles(), sum_step = g_.points * g_.width;
    float* sums = thread_scratch(kSumSlot, tiles * sum_step);
    const int64_t parts = ceil_div(tiles, g_.table->rows);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const int64_t width = g_.panel_width(n_, panel);
      const int vectors = static_cast<int>(width / g_.lanes);
      const float* w = g_.panel_weight(n_, weight, panel);
      for (int64_t point = 0; point < g_.points; ++point, w += n_.kept_in * width) {
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t first = part * tiles / parts, rows = (part + 1) * tiles / parts - first;
          g_.table->product[rows - 1][vectors - 1]({values_ + point * point_step_ + first * g_.lanes, channel_step_, w,
                                                    n_.kept_in, sums + first * sum_step + point * g_.width, sum_step});
        }
      }
      transform_output(panel, vectors, sums);
    }
  }

 private:
  const float* x(int64_t image, int64_t row, int64_t column) const {
    return reinterpret_cast<const float*>(n_.pixel(image, row, column));
  }

  // The pixels that the block reads, [image][row][column][channel].
  const float* copy_pixels() const {
    const int64_t area = in_rows_ * in_columns_, count = b_.images * area;
    float* pixels = thread_scratch(kPixelSlot, count * g_.channels + g_.lanes);
    const bool planes = n_.x_stride_w == 1 && n_.x_stride_c != 1;
    const bool joined = n_.x_stride_h == n_.width * n_.x_stride_w && in_columns_ == n_.width;
    const int64_t runs = joined ? 1 : in_rows_, length = joined ? area : in_columns_;
    std::vector<const float*> channels(planes ? n_.kept_in : 0);
    float* out = pixels;
    for (int64_t image = b_.first_image; image < b_.first_image + b_.images; ++image) {
      for (int64_t run = 0; run < runs; ++run, out += length * g_.channels) {
        const float* in = x(image, in_row_ + run, in_column_);
        if (planes) {
          for (int64_t i = 0; i < n_.kept_in; ++i) channels[i] = in + n_.channel(i) * n_.x_stride_c;
          micro::planes_to_pixels(channels.data(), n_.kept_in, length, out, g_.channels);
        } else if (n_.x_stride_c == 1 && n_.in_index) {
          g_.table->gather({length, n_.kept_in, in, n_.x_stride_w, n_.in_index, g_.moves.data(),
                            static_cast<int64_t>(g_.moves.size()), out, g_.channels});
        } else {
          for (int64_t p = 0; p < length; ++p) {
            const float* pixel = in + p * n_.x_stride_w;
            for (int64_t i = 0; i < n_.kept_in; ++i) out[p * g_.channels + i] = pixel[n_.channel(i) * n_.x_stride_c];
          }
        }
      }
    }
    if (n_.has_prologue) run_prologue(pixels, count);
    return pixels;
  }

  void run_prologue(float* pixels, int64_t count) const {
    const auto padded = [&](const float* values) {
      std::vector<float> all(values ? g_.channels : 0, 0.f);
      if (values) std::copy_n(values, n_.kept_in, all.begin());
      return all;
    };
    const std::vector<float> scale = padded(n_.in_scale), shift = padded(n_.in_shift);
    g_.table->prologue({count, g_.channels, pixels, scale.empty() ? nullptr : scale.data(),
                        shift.empty() ? nullptr : shift.data(), n_.in_relu});
  }

  void transform_input() {
    const float* pixels = g_.in_place ? nullptr : copy_pixels();
    const float* none = zeros(g_.channels);
    std::vector<const float*> table(b_.tiles() * g_.points);
    const float** point = table.data();
    for (int64_t image = 0; image < b_.images; ++image) {
      for (int64_t tile_row = 0; tile_row < b_.rows; ++tile_row) {
        for (int64_t tile_column = 0; tile_column < b_.columns; ++tile_column) {
          const int64_t top = (b_.first_row + tile_row) * g_.size - n_.pad_top;
          const int64_t left = (b_.first_column + tile_column) * g_.size - n_.pad_left;
          for (int64_t row = top; row < top + g_.edge; ++row) {
            const bool inside = row >= 0 && row < n_.height;
            const float* first = nullptr;
            int64_t step = g_.channels;
            if (inside && g_.in_place) {
              first = x(b_.first_image + image, row, 0);
              step = n_.x_stride_w;
            } else if (inside) {
              first = pixels + ((image * in_rows_ + row - in_row_) * in_columns_ - in_column_) * g_.channels;
            }
            for (int64_t column = left; column < left + g_.edge; ++column) {
              *point++ = inside && column >= 0 && column < n_.width ? first + column * step : none;
            }
          }
        }
      }
    }
    // An odd number of lines from point to point: a power of two would leave them few sets of the L1 cache.
    channel_step_ = b_.tiles() * g_.lanes;
    point_step_ = round_up(g_.channels / g_.lanes * channel_step_, 16);
    if (point_step_ / 16 % 2 == 0) point_step_ += 16;
    float* values = thread_scratch(kValueSlot, g_.points * point_step_);
    g_.transforms->input({b_.tiles(), g_.channels, table.data(), values, point_step_, channel_step_});
    values_ = values;
  }

  // Numbers of the results' pixels: those of the whole result in channels_last, those of the block otherwise.
  void place_results() {
    places_.resize(b_.tiles() * g_.size * g_.size);
    int64_t* place = places_.data();
    for (int64_t image = 0; image < b_.images; ++image) {
      const int64_t base = g_.channels_last ? ((b_.first_image + image) * n_.out_h + out_row_) * n_.out_w + out_column_
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

  void transform_output(int64_t panel, int vectors, const float* sums) const {
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
    t.out = thread_scratch(kResultSlot, b_.images * area * g_.width);
    t.out_step = g_.width;
    t.valid = vectors * g_.lanes;
    g_.transforms->output[vectors - 1](t);
    const bool joined = out_columns_ == n_.out_w;
    const int64_t runs = joined ? 1 : out_rows_, length = joined ? area : out_columns_;
    const float* in = t.out;
    for (int64_t image = b_.first_image; image < b_.first_image + b_.images; ++image) {
      for (int64_t run = 0; run < runs; ++run, in += length * g_.width) {
        const int64_t place = (image * n_.kept_out + channel) * image_area + (out_row_ + run) * n_.out_w + out_column_;
        micro::pixels_to_planes(in, g_.width, valid, length, y + place, image_area,
                                residual ? residual + place : nullptr, n_.out_relu, n_.out_max);
      }
    }
  }

  const NativeCall& n_;
  const Geometry& g_;
  const Block& b_;
  int64_t in_row_, in_rows_, in_column_, in_columns_, out_row_, out_rows_, out_column_, out_columns_;
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
