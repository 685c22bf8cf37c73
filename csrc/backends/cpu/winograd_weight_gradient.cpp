// Weight gradient of 3 x 3 convolutions of stride 1, in float32, by the steps of Winograd's convolution backwards:
//   dw[j, i] = G^T [ sum over tiles of (A dy[j] A^T) * (B^T x[i] B) ] G        with * element by element
// which multiplies a quarter as often as the direct sum, with tiles of 4 x 4.
//   block   a rectangle of tiles, or several images
//   slab    consecutive blocks, whose transforms are kept at once
//   1       for each block of a slab: the transforms of groups of listed channels of x, and of live channels of dy
//   2       for each panel of filters and range of channels: one outer product for each point, added up in memory
//   3       after the last slab: the sums of a channel and a vector of filters to their 3 x 3 taps
// Sums run over the tiles of a block, then over blocks in order. Blocks depend on the shape alone, so results do not
// vary with threads or runs.
#include <ATen/ops/empty.h>

#include <algorithm>

#include "backends/cpu/gradient_call.h"
#include "backends/cpu/isa.h"
#include "backends/cpu/native_call.h"
#include "backends/cpu/scratch.h"
#include "backends/cpu/winograd.h"
#include "backends/cpu/winograd_tiles.h"

namespace bap_kernels {
namespace {

// A block's values of one point and a panel of filters stay in the L1 cache.
constexpr int64_t kMostTiles = 64;
// Of transforms that are kept at once, for each two threads.
constexpr int64_t kSlabFloats = 2 * 1024 * 1024;
// Channels of a transform for two threads, and for more.
constexpr int64_t kMostChannels = 64, kFewChannels = 32;
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kTaps = 9, kMostLanes = 16;

// One of the two tensors: its channels in groups, each transformed by itself.
struct Side {
  std::vector<TileSource> groups;
  std::vector<int64_t> first_channel;  // of each group, among the padded ones
  int64_t channels = 0;                // all, padded

  Side(const at::Tensor& t, const int32_t* list, int64_t count, int64_t pad_top, int64_t pad_left, int64_t step,
       int64_t edge) {
    const int64_t most = free_threads() > 2 ? kFewChannels : kMostChannels;
    for (int64_t first = 0; first < count; first += most) {
      TileSource source{t.const_data_ptr<float>() + (list ? 0 : first * t.stride(1)),
                        t.stride(0),
                        t.stride(1),
                        t.stride(2),
                        t.stride(3),
                        t.size(2),
                        t.size(3),
                        pad_top,
                        pad_left,
                        list ? list + first : nullptr,
                        std::min(most, count - first),
                        step,
                        edge};
      source.all_channels = t.size(1);
      source.plan(/*copied=*/false);
      first_channel.push_back(channels);
      channels += source.channels;
      groups.push_back(std::move(source));
    }
  }
};

// A panel of filters, and a range of rows of the outer products, which are channels of x.
struct Part {
  int64_t first_vector, vectors, first_row, last_row;
};

class WeightGradient {
 public:
  WeightGradient(const GradientCall& c, int64_t size)
      : c_(c),
        table_(*isa_winograd()),
        transforms_(table_.transforms[size == kWinogradLarge ? 0 : 1]),
        edge_(size + 2),
        points_(edge_ * edge_),
        lanes_(table_.lanes),
        x_(c.input, c.in_index, c.shape.kept_in, c.padding[kTop], c.padding[kLeft], size, edge_),
        dy_(c.grad_output, c.all_live ? nullptr : c.live.data(), c.live_count(), 0, 0, size, size) {
    blocks_ = cut_tiles(c.shape.batch, ceil_div(c.shape.out_h, size), ceil_div(c.shape.out_w, size), kMostTiles, 1);
    threads_ = free_threads();
    make_parts();
  }

  void run(at::Tensor& dw) {
    const int64_t floats = points_ * (x_.channels + dy_.channels);
    const int64_t most_floats = kSlabFloats * std::max<int64_t>(1, threads_ / 2);
    // The sums of one block alone go from a thread's memory to the taps, a few channels at a time.
    const bool alone = blocks_.size() == 1 && point_groups_ == 1;
    const int64_t sum_floats = points_ * row_blocks() * table_.outer_rows * filter_vectors() * lanes_;
    const at::Tensor sums = at::empty({alone ? 0 : sum_floats}, c_.input.options());
    at::Tensor kept;
    for (size_t first = 0; first < blocks_.size();) {
      place_.assign(1, 0);
      size_t end = first;
      while (end < blocks_.size() && (end == first || place_.back() + floats * blocks_[end].tiles() <= most_floats)) {
        const int64_t tiles = blocks_[end++].tiles();
        place_.push_back(place_.back() +
                         points_ * (point_step_of(x_.channels, tiles) + point_step_of(dy_.channels, tiles)));
      }
      if (!kept.defined() || kept.numel() < place_.back()) kept = at::empty({place_.back()}, c_.input.options());
      run_slab(first, end, kept.mutable_data_ptr<float>(), alone ? nullptr : sums.mutable_data_ptr<float>(), dw);
      first = end;
    }
  }

 private:
  int64_t row_blocks() const { return ceil_div(c_.shape.kept_in, table_.outer_rows); }
  int64_t filter_vectors() const { return ceil_div(c_.live_count(), lanes_); }

  // Panels of about equal width, rows in as many ranges as the threads need, and points, too, where rows are too few.
  void make_parts() {
    const int64_t vectors = filter_vectors(), panels = ceil_div(vectors, table_.outer_vectors);
    const int64_t wanted = kTasksPerThread * threads_;
    const int64_t ranges = std::clamp<int64_t>(ceil_div(wanted, panels), 1, row_blocks());
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t first = panel * vectors / panels, last = (panel + 1) * vectors / panels;
      for (int64_t r = 0; r < ranges; ++r) {
        parts_.push_back({first, last - first, r * row_blocks() / ranges, (r + 1) * row_blocks() / ranges});
      }
    }
    point_groups_ = threads_ <= 2 ? 1 : std::min(points_, ceil_div(wanted, panels * ranges));
  }

  void run_slab(size_t first, size_t end, float* kept, float* sums, at::Tensor& dw) {
    const int64_t groups = static_cast<int64_t>(x_.groups.size() + dy_.groups.size());
    const auto block_of = [&](int64_t task) -> const TileBlock& { return blocks_[first + task / groups]; };
    const auto transform_cycles = [&](int64_t task) {
      const auto group = static_cast<size_t>(task % groups);
      const TileSource& source = group < x_.groups.size() ? x_.groups[group] : dy_.groups[group - x_.groups.size()];
      return pass_cycles(2 * block_of(task).tiles() * points_ * source.channels);
    };
    parallel_tasks(static_cast<int64_t>(end - first) * groups, 1, transform_cycles, [&](int64_t begin, int64_t last) {
      for (int64_t task = begin; task < last; ++task) {
        transform(block_of(task), task % groups, kept + place_[task / groups]);
      }
    });
    int64_t tiles = 0;
    for (size_t b = first; b < end; ++b) tiles += blocks_[b].tiles();
    const auto sum_cycles = [&](int64_t task) {
      const Part& part = parts_[task / point_groups_];
      const int64_t rows = (part.last_row - part.first_row) * table_.outer_rows, filters = part.vectors * lanes_;
      return direct_cycles(rows, filters, points_ / point_groups_ * tiles);
    };
    parallel_tasks(static_cast<int64_t>(parts_.size()) * point_groups_, 1, sum_cycles,
                   [&](int64_t begin, int64_t last) {
                     for (int64_t task = begin; task < last; ++task) {
                       const Part& part = parts_[task / point_groups_];
                       if (!sums) {
                         run_alone(part, kept, dw);
                         continue;
                       }
                       const int64_t group = task % point_groups_;
                       add_blocks(part, group * points_ / point_groups_, (group + 1) * points_ / point_groups_, first,
                                  end, kept, sums);
                     }
                   });
    if (!sums || end < blocks_.size()) return;
    const auto store_cycles = [&](int64_t number) {
      const Part& part = parts_[number];
      return pass_cycles(points_ * (part.last_row - part.first_row) * table_.outer_rows * part.vectors * lanes_);
    };
    parallel_tasks(static_cast<int64_t>(parts_.size()), 1, store_cycles, [&](int64_t begin, int64_t last) {
      for (int64_t number = begin; number < last; ++number) {
        const Part& part = parts_[number];
        for (int64_t r = part.first_row; r < part.last_row; ++r) store(part, r, part_sums(part, sums, r), dw);
      }
    });
  }

  // Transforms of one group of channels of x, or of dy behind them: [point][channel / lanes][tile][lanes].
  void transform(const TileBlock& block, int64_t group, float* out) const {
    const bool of_x = group < static_cast<int64_t>(x_.groups.size());
    const Side& side = of_x ? x_ : dy_;
    const auto own = static_cast<size_t>(of_x ? group : group - static_cast<int64_t>(x_.groups.size()));
    const int64_t tiles = block.tiles(), step = tiles * lanes_;
    if (!of_x) out += points_ * point_step_of(x_.channels, tiles);
    out += side.first_channel[own] / lanes_ * step;
    const TileSource& source = side.groups[own];
    const std::vector<const float*> points = tile_points(source, block);
    (of_x ? transforms_.input : transforms_.gradient)(
        {tiles, source.channels, points.data(), out, point_step_of(side.channels, tiles), step});
  }

  // Sums of a part, [row block][point][row][vector of filters], those of other panels before and behind them.
  float* part_sums(const Part& part, float* sums, int64_t row_block) const {
    const int64_t of_vector = row_blocks() * points_ * table_.outer_rows * lanes_;
    return sums + part.first_vector * of_vector + row_block * points_ * table_.outer_rows * part.vectors * lanes_;
  }

  // One outer product, of a point and a block of rows.
  void add(const Part& part, int64_t point, int64_t row_block, int64_t tiles, const float* values, float* sums,
           bool more) const {
    const int64_t rows = table_.outer_rows, channel = row_block * rows, step = tiles * lanes_;
    const int64_t x_step = point_step_of(x_.channels, tiles), dy_step = point_step_of(dy_.channels, tiles);
    table_.outer[part.vectors - 1]({tiles, values + point * x_step + channel / lanes_ * step + channel % lanes_,
                                    values + points_ * x_step + part.first_vector * step + point * dy_step, step,
                                    sums + point * rows * part.vectors * lanes_, more});
  }

  // The sums at points [first_point, last_point) of blocks [first, end).
  void add_blocks(const Part& part, int64_t first_point, int64_t last_point, size_t first, size_t end,
                  const float* kept, float* sums) const {
    for (size_t b = first; b < end; ++b) {
      for (int64_t point = first_point; point < last_point; ++point) {
        for (int64_t r = part.first_row; r < part.last_row; ++r) {
          add(part, point, r, blocks_[b].tiles(), kept + place_[b - first], part_sums(part, sums, r), b > 0);
        }
      }
    }
  }

  void run_alone(const Part& part, const float* kept, at::Tensor& dw) const {
    float* sums = thread_scratch(Scratch::kWinogradSums, points_ * table_.outer_rows * part.vectors * lanes_);
    for (int64_t r = part.first_row; r < part.last_row; ++r) {
      for (int64_t point = 0; point < points_; ++point) add(part, point, r, blocks_[0].tiles(), kept, sums, false);
      store(part, r, sums, dw);
    }
  }

  // Takes the sums of a block of rows to the taps of dw.
  void store(const Part& part, int64_t row_block, const float* sums, at::Tensor& dw) const {
    const int64_t rows = table_.outer_rows, width = part.vectors * lanes_;
    auto* out = dw.mutable_data_ptr<float>();
    int64_t place[kTaps];
    for (int64_t tap = 0; tap < kTaps; ++tap) place[tap] = tap / 3 * dw.stride(2) + tap % 3 * dw.stride(3);
    alignas(64) float taps[kTaps * kMostLanes];
    const int64_t first = row_block * rows, last = std::min(first + rows, c_.shape.kept_in);
    for (int64_t i = first; i < last; ++i, sums += width) {
      float* channel = out + (c_.in_index ? c_.in_index[i] : i) * dw.stride(1);
      for (int64_t v = 0; v < part.vectors; ++v) {
        transforms_.taps({sums + v * lanes_, rows * width, taps});
        const int64_t j = (part.first_vector + v) * lanes_, count = std::min(lanes_, c_.live_count() - j);
        for (int64_t l = 0; l < count; ++l) {
          float* filter = channel + c_.live_filter(j + l) * dw.stride(0);
          for (int64_t tap = 0; tap < kTaps; ++tap) filter[place[tap]] = taps[tap * lanes_ + l];
        }
      }
    }
  }

  const GradientCall& c_;
  const micro::WinogradTable& table_;
  const micro::WinogradTransforms& transforms_;
  const int64_t edge_, points_, lanes_;
  const Side x_, dy_;
  std::vector<TileBlock> blocks_;
  std::vector<int64_t> place_;  // of each block's transforms in a slab, and the end
  std::vector<Part> parts_;
  int64_t point_groups_ = 1;
  int64_t threads_ = 1;
};

}  // namespace

void winograd_weight_gradient(const GradientCall& c, int64_t size, at::Tensor& dw) { WeightGradient(c, size).run(dw); }

}  // namespace bap_kernels
