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
  for (int r = 0; r < plan.count.count(); ++r) {
    for (int t = 0; t < plan.taps.count(); ++t) {
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
      require(plan.count.count() <= ceil_div(a.input, a.stride), "a phase has more places than the grid holds");
      for (int r = 0; r < plan.count.count(); ++r) places.insert(r * plan.result_step + plan.result_first);
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
        const TilePlace at = tile_place(block, rows, divisor_of(columns));
        require(at.row >= 0 && at.row < rows && at.column >= 0 && at.column < columns, "a tile is outside");
        seen.insert({at.row, at.column});
      }
      require(static_cast<int>(seen.size()) == rows * columns, "a tile is missing");
    }
  }
}

void row_places() {
  for (int m = 0; m < 3 * 5 * 7; ++m) {
    const RowPlace at = row_place(m, divisor_of(5), divisor_of(7));
    require((at.image * 5 + at.row) * 7 + at.column == m && within(at.row, 5) && within(at.column, 7), "a row is lost");
  }
}

void steps_of_the_sum() {
  const int depth = 64;
  const int64_t source_h = 1000, source_w = 90, filter_tap = 128;
  for (int kernel_h = 1; kernel_h <= 3; ++kernel_h) {
    for (int kernel_w = 1; kernel_w <= 3; ++kernel_w) {
      const AxisPlan h = gradient_axis({9, 5, kernel_h, 2, 1, 1}, 1), w = forward_axis({9, 9, kernel_w, 1, 1, 2});
      const auto at = [&](int number) {
        return step_at(number, h, w, source_h, source_w, kernel_w, filter_tap, depth);
      };
      StepWalk step = at(0);
      int number = 0;
      for (int block = 0; h.taps.count() > 0 && block < 4; ++block) {
        for (int i = 0; i < h.taps.count(); ++i) {
          for (int j = 0; j < w.taps.count(); ++j) {
            const StepWalk jump = at(number++);
            require(jump.block == step.block && jump.tap_h == step.tap_h && jump.tap_w == step.tap_w &&
                        jump.source == step.source && jump.filter == step.filter &&
                        jump.source_line == step.source_line && jump.filter_line == step.filter_line,
                    "a part of the sum begins elsewhere");
            require(step.block == block && step.tap_h == i && step.tap_w == j, "the order of the sum differs");
            const int tap = (h.weight_first + i * h.weight_step) * kernel_w + w.weight_first + j * w.weight_step;
            require(step.filter == tap * filter_tap + block * depth, "a step reads another tap of a filter");
            require(step.source == i * h.tap_step * source_h + j * w.tap_step * source_w, "a step reads another pixel");
            const bool last = i == h.taps.count() - 1 && j == w.taps.count() - 1;
            require(advance(step, h, w, source_h, source_w, kernel_w, filter_tap, depth) == last,
                    "a block of channels ends elsewhere");
          }
        }
      }
    }
  }
}

void quotients() {
  const auto check = [](int number, int64_t n) {
    if (n < 0 || n > INT32_MAX) return;
    const Divisor divisor = divisor_of(number);
    const int quotient = divisor.quotient(static_cast<int>(n));
    require(quotient == n / number && divisor.rest(static_cast<int>(n), quotient) == n % number, "a quotient differs");
  };
  const auto check_number = [&](int64_t number) {
    if (number < 1 || number > INT32_MAX) return;
    for (int64_t n = 0; n < 200; ++n) check(static_cast<int>(number), n);
    // Around multiples, where a quotient is wrong first; the last ones most of all.
    const int64_t most = INT32_MAX / number;
    for (const int64_t factor : {int64_t{1}, int64_t{2}, int64_t{3}, most / 2, most - 1, most}) {
      for (int64_t n = factor * number - 2; n <= factor * number + 2; ++n) check(static_cast<int>(number), n);
    }
    for (int64_t n = INT32_MAX - int64_t{2}; n <= INT32_MAX; ++n) check(static_cast<int>(number), n);
  };
  for (int64_t number = 1; number <= 5000; ++number) check_number(number);
  for (int shift = 12; shift <= 31; ++shift) {
    for (int64_t by = -3; by <= 3; ++by) check_number((int64_t{1} << shift) + by);
  }
  require(divisor_of(0).quotient(0) == 0, "no places, and the first of them");
}

void lists() {
  const int32_t entries[] = {5, 0, 3, 9};
  for (int block : {8, 16, 32}) {
    for (int k = 0; k < 4 * block; ++k) {
      require(listed_channel({entries, block, __builtin_ctz(block)}, k) == entries[k / block] * block + k % block,
              "a block's channel differs");
    }
  }
  for (int k = 0; k < 4; ++k) require(listed_channel({entries, 1, 0}, k) == entries[k], "a channel differs");
  require(listed_channel({nullptr, 0, 0}, 7) == 7, "without a list a channel is its own");
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
          {"quotients", quotients},
          {"lists", lists},
          {"runs", runs}};
}

}  // namespace bap_kernels
