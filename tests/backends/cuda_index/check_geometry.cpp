// Axis plans, rows, steps and lists against plain loops.
#include "check.h"

#include <tuple>

#include "backends/cuda/kernels/conv_params.h"
#include "backends/cuda/kernels/tile_layout.h"

namespace bap_kernels {
namespace {

using Meeting = std::tuple<int, int, int>;  // stored place, source place, tap of the weight

std::multiset<Meeting> meetings(const AxisPlan& plan) {
  std::multiset<Meeting> found;
  for (int r = 0; r < plan.count; ++r) {
    for (int t = 0; t < plan.taps; ++t) {
      const int source = r * plan.source_step + plan.source_first + t * plan.tap_step;
      if (within(source, plan.source_size)) {
        found.insert({r * plan.result_step + plan.result_first, source, plan.weight_first + t * plan.weight_step});
      }
    }
  }
  return found;
}

void forward_axes() {
  for_axes([](const ConvAxis& a) {
    std::multiset<Meeting> wanted;
    for (int o = 0; o < a.output; ++o) {
      for (int t = 0; t < a.kernel; ++t) {
        const int i = o * a.stride - a.before + t * a.dilation;
        if (i >= 0 && i < a.input) wanted.insert({o, i, t});
      }
    }
    require(meetings(forward_axis(a)) == wanted, "a forward axis differs");
  });
}

void gradient_axes() {
  for_axes([](const ConvAxis& a) {
    std::multiset<Meeting> wanted, found;
    for (int o = 0; o < a.output; ++o) {
      for (int t = 0; t < a.kernel; ++t) {
        const int i = o * a.stride - a.before + t * a.dilation;
        if (i >= 0 && i < a.input) wanted.insert({i, o, t});
      }
    }
    std::multiset<int> places;
    for (int phase = 0; phase < a.stride; ++phase) {
      const AxisPlan plan = gradient_axis(a, phase);
      require(plan.count <= ceil_div(a.input, a.stride), "a phase has more places than the grid holds");
      for (int r = 0; r < plan.count; ++r) places.insert(r * plan.result_step + plan.result_first);
      for (const Meeting& m : meetings(plan)) found.insert(m);
    }
    require(found == wanted, "a gradient's axis differs");
    std::multiset<int> all;
    for (int i = 0; i < a.input; ++i) all.insert(i);
    require(places == all, "the phases do not store every place once");
  });
}

void tile_order() {
  for (int rows = 1; rows <= 20; ++rows) {
    for (int columns = 1; columns <= 5; ++columns) {
      std::set<std::pair<int, int>> seen;
      for (int block = 0; block < rows * columns; ++block) {
        const TilePlace at = tile_place(block, rows, columns, 8);
        require(at.row >= 0 && at.row < rows && at.column >= 0 && at.column < columns, "a tile is outside");
        seen.insert({at.row, at.column});
      }
      require(static_cast<int>(seen.size()) == rows * columns, "a tile is missing");
    }
  }
}

void row_places() {
  for (int m = 0; m < 3 * 5 * 7; ++m) {
    const RowPlace at = row_place(m, 5, 7);
    require((at.image * 5 + at.row) * 7 + at.column == m && within(at.row, 5) && within(at.column, 7), "a row is lost");
  }
}

void steps_of_the_sum() {
  for (int taps_h = 1; taps_h <= 3; ++taps_h) {
    for (int taps_w = 1; taps_w <= 3; ++taps_w) {
      StepCursor cursor{0, 0, 0};
      for (int block = 0; block < 4; ++block) {
        for (int h = 0; h < taps_h; ++h) {
          for (int w = 0; w < taps_w; ++w) {
            require(cursor.block == block && cursor.tap_h == h && cursor.tap_w == w, "the order of the sum differs");
            const bool last = h == taps_h - 1 && w == taps_w - 1;
            require(advance(cursor, taps_h, taps_w) == last, "a block of channels ends elsewhere");
          }
        }
      }
    }
  }
}

void lists() {
  const int32_t entries[] = {5, 0, 3, 9};
  for (int block : {8, 16, 32}) {
    for (int k = 0; k < 4 * block; ++k) {
      require(listed_channel(entries, block, k) == entries[k / block] * block + k % block, "a block's channel differs");
    }
  }
  for (int k = 0; k < 4; ++k) require(listed_channel(entries, 1, k) == entries[k], "a channel differs");
  require(listed_channel(nullptr, 0, 7) == 7, "without a list a channel is its own");
  for (int first = 0; first < 40; first += 8) {
    for (int end = 0; end <= 40; ++end) {
      const int wanted = std::max(0, std::min(8, end - first)) * 2;
      require(chunk_bytes<2>(first, end) == wanted, "a chunk's bytes differ");
    }
  }
}

void runs() {
  Runs mixed{};
  mixed.count = 3;
  // In the order of blocks, which is not that of images.
  mixed.of[0].first = 5, mixed.of[0].images = 2;
  mixed.of[1].first = 0, mixed.of[1].images = 4;
  mixed.of[2].first = 4, mixed.of[2].images = 1;
  const int wanted[7][2] = {{0, 5}, {0, 6}, {1, 0}, {1, 1}, {1, 2}, {1, 3}, {2, 4}};
  for (int number = 0; number < 7; ++number) {
    const ImagePlace at = image_place(mixed, number);
    require(at.run == wanted[number][0] && at.image == wanted[number][1], "an image is in another run");
  }
}

}  // namespace

Checks geometry_checks() {
  return {{"forward_axes", forward_axes},
          {"gradient_axes", gradient_axes},
          {"tile_order", tile_order},
          {"row_places", row_places},
          {"steps", steps_of_the_sum},
          {"lists", lists},
          {"runs", runs}};
}

}  // namespace bap_kernels
