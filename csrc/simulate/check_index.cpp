// Checks of the kernels' index arithmetic against plain loops: axis plans, tile order, copies, swizzles, fragments,
// lists, conversions, and the simulated memory's own rules. `check_index NAME` runs one and says what is wrong.
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <set>
#include <string>

#include "kernels/channel_pack_block.h"
#include "kernels/gathered_conv2d_block.h"
#include "kernels/instances.h"
#include "kernels/weight_gradient_block.h"
#include "simulate/simulated_block.h"

namespace bap_kernels {
namespace {

void require(bool holds, const std::string& what) {
  if (!holds) throw std::logic_error(what);
}

template <class Body>
void for_axes(Body body) {
  for (int kernel = 1; kernel <= 5; ++kernel) {
    for (int stride = 1; stride <= 4; ++stride) {
      for (int before = 0; before <= 3; ++before) {
        for (int dilation = 1; dilation <= 4; ++dilation) {
          for (int input = 1; input <= 13; ++input) {
            const int output = (input + before + 1 - dilation * (kernel - 1) - 1) / stride + 1;
            if (output > 0 && input + before + 1 > dilation * (kernel - 1)) {
              body(ConvAxis{input, output, kernel, stride, before, dilation});
            }
          }
        }
      }
    }
  }
}

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

template <class Body>
void for_tiles(Body body) {
#define BAP_KERNELS_CALL(name, ...) body(#name, name##Tile{});
  BAP_KERNELS_TILES(BAP_KERNELS_CALL)
#undef BAP_KERNELS_CALL
}

template <class Tile, int kBytes>
void check_copies(const std::string& name) {
  constexpr int kDepth = kDepthBytes / kBytes, kThreads = Tile::kThreads;
  for (const int rows : {Tile::kRows, Tile::kColumns}) {
    std::set<std::pair<int, int>> parts;
    std::set<int> places;
    for (int thread = 0; thread < kThreads; ++thread) {
      for (int i = 0; i < rows * kDepthChunks / kThreads; ++i) {
        const int row = copy_row<kThreads>(thread, i), chunk = copy_chunk(thread);
        parts.insert({row, chunk});
        places.insert(by_rows(row, chunk));
      }
    }
    const size_t count = rows * kDepthChunks;
    require(parts.size() == count && places.size() == count, name + ": copies by rows miss or repeat a chunk");
    require(*places.rbegin() == rows * kDepthBytes - kChunkBytes, name + ": copies by rows leave their tile");
  }
  const auto by_depth_of = [&](auto tag, int rows) {
    constexpr int kRows = decltype(tag)::value;
    std::set<std::pair<int, int>> parts;
    std::set<int> places;
    const int chunks = rows * kBytes / kChunkBytes;
    for (int thread = 0; thread < kThreads; ++thread) {
      for (int i = 0; i < chunks * kDepth / kThreads; ++i) {
        const int depth = copy_depth<kThreads, kBytes>(thread), chunk = copy_depth_chunk<kThreads, kBytes>(thread, i);
        require(depth < kDepth && chunk < chunks, name + ": a copy by depth is outside");
        parts.insert({depth, chunk});
        places.insert(by_depth<kRows, kBytes>(depth, chunk));
      }
    }
    const size_t count = chunks * kDepth;
    require(parts.size() == count && places.size() == count, name + ": copies by depth miss or repeat a chunk");
    require(*places.rbegin() == rows * kDepthBytes - kChunkBytes, name + ": copies by depth leave their tile");
  };
  by_depth_of(std::integral_constant<int, Tile::kRows>{}, Tile::kRows);
  if constexpr (Tile::kColumns >= 64) by_depth_of(std::integral_constant<int, Tile::kColumns>{}, Tile::kColumns);
}

void copies() {
  for_tiles([](const std::string& name, auto tile) {
    check_copies<decltype(tile), 2>(name);
    check_copies<decltype(tile), 4>(name);
  });
}

// How often the busiest of 32 banks of 4 bytes is hit by one group of accesses to different words.
int busiest_bank(const std::vector<int>& offsets, int bytes) {
  std::map<int, std::set<int>> banks;
  for (const int at : offsets) {
    for (int word = at / 4; word < (at + bytes + 3) / 4; ++word) banks[word % 32].insert(word);
  }
  size_t most = 0;
  for (const auto& [bank, words] : banks) most = std::max(most, words.size());
  return static_cast<int>(most);
}

void banks() {
  for (int slice = 0; slice < kSlices; ++slice) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      std::vector<int> a, b, a_turned, b_turned;
      for (int lane = 8 * matrix; lane < 8 * matrix + 8; ++lane) {
        a.push_back(by_rows(matrix_row_a(lane), 2 * slice + matrix_chunk_a(lane)));
        b.push_back(by_rows(matrix_row_b(lane), 2 * slice + matrix_chunk_b(lane)));
        a_turned.push_back(by_depth<64, 2>(16 * slice + transposed_depth_a(lane), transposed_chunk_a(lane)));
        b_turned.push_back(by_depth<128, 2>(16 * slice + transposed_depth_b(lane), transposed_chunk_b(lane)));
      }
      for (const auto& rows : {a, b, a_turned, b_turned}) {
        require(busiest_bank(rows, kChunkBytes) == 1, "the rows of a matrix share a bank");
      }
    }
    for (int r = 0; r < 4; ++r) {
      std::vector<int> words;
      for (int lane = 0; lane < kWarp; ++lane) {
        const int m = fragment_row_a(lane, r);
        words.push_back(by_depth<64, 4>(8 * slice + fragment_depth_a(lane, r), m / 4) + m % 4 * 4);
      }
      require(busiest_bank(words, 4) == 1, "words of a transposed fragment share a bank");
    }
  }
  std::vector<int> pairs, words;
  for (int lane = 0; lane < kWarp; ++lane) {
    using Rows = ConvEpilogue<HalfWord, SmallTile, false>;
    using Planes = ConvEpilogue<HalfWord, SmallTile, true>;
    // Two words of a row are stored at once, half a warp at a time.
    if (lane < 16) pairs.push_back(Rows::staged(fragment_row_c(lane, 0), fragment_column_c(lane, 0)) * 4);
    words.push_back(Planes::staged(fragment_row_c(lane, 0), fragment_column_c(lane, 0)) * 4);
  }
  require(busiest_bank(pairs, 8) == 1, "staged pairs share a bank");
  require(busiest_bank(words, 4) == 1, "staged words share a bank");
}

void stages() {
  for_tiles([](const std::string& name, auto tile) {
    using Tile = decltype(tile);
    using Rows = ConvEpilogue<HalfWord, Tile, false>;
    using Planes = ConvEpilogue<HalfWord, Tile, true>;
    std::set<int> rows, planes;
    for (int i = 0; i < Tile::kRows; ++i) {
      for (int j = 0; j < Tile::kColumns; ++j) {
        rows.insert(Rows::staged(i, j));
        planes.insert(Planes::staged(i, j));
      }
    }
    const size_t count = Tile::kRows * Tile::kColumns;
    require(rows.size() == count && planes.size() == count, name + ": two staged results share a place");
    require(*rows.rbegin() * 4 < Tile::kTableAt && *planes.rbegin() * 4 < Tile::kTableAt,
            name + ": staged results reach into the table");
    // The least that a processor of the kernels' devices gives a block (compute capability 8.6).
    require(Tile::kSharedBytes <= 99 * 1024, name + ": more shared memory than every device has");
  });
}

void conversions() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto word = static_cast<uint16_t>(bits);
    const float half = to_float(HalfWord{word}), brain = to_float(BFloat16Word{word});
    const int exponent = (word >> 10) & 31, mantissa = word & 1023, sign = word & 0x8000 ? -1 : 1;
    if (exponent < 31) {
      const double wanted = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
      require(half == static_cast<float>(sign * wanted), "a half differs");
      require(from_float<HalfWord>(half).bits == word, "a half does not come back");
    } else {
      require(mantissa ? std::isnan(half) : half == sign * INFINITY, "a special half differs");
    }
    if (!std::isnan(brain)) require(from_float<BFloat16Word>(brain).bits == word, "a bfloat16 does not come back");
    if (exponent < 30 && sign > 0) {
      // Halfway to the next one goes to the even one, a little more or less to the nearer one.
      const float next = to_float(HalfWord{static_cast<uint16_t>(word + 1)}), middle = (half + next) / 2;
      const auto even = static_cast<uint16_t>(word + word % 2);
      require(from_float<HalfWord>(middle).bits == even, "a tie of halves is not even");
      require(from_float<HalfWord>(std::nextafter(middle, 0.0f)).bits == word, "a half is not the nearest below");
      require(from_float<HalfWord>(std::nextafter(middle, 1e9f)).bits == word + 1, "a half is not the nearest above");
    }
  }
  require(from_float<HalfWord>(65520.0f).bits == 0x7c00 && from_float<HalfWord>(65519.0f).bits == 0x7bff,
          "halves do not end where they should");
  require(std::isnan(to_float(from_float<HalfWord>(NAN))) && std::isnan(to_float(from_float<BFloat16Word>(NAN))),
          "NaN is lost");
  for (float value : {1.0f, 3.14159f, -2.71828f, 1e-20f, 1e20f, 0.0f}) {
    const uint32_t bits = bits_of(value), high = to_tf32(bits);
    require((high & 0x1fff) == 0, "TF32 has more bits than it should");
    require(std::abs(float_of(high) - value) <= std::abs(value) * 0x1p-11f, "TF32 is not the nearest");
    const float both = float_of(high) + float_of(tf32_rest(bits, high));
    require(std::abs(both - value) <= std::abs(value) * 0x1p-21f, "two TF32 parts are not near float32");
  }
  require(tf32_rest(bits_of(INFINITY), to_tf32(bits_of(INFINITY))) == 0, "infinity has a rest");
}

void memory_rules() {
  const auto caught = [](const char* what, const std::function<void(SimulatedMemory&)>& misuse) {
    SimulatedMemory memory(256);
    const float value = 1;
    for (int w = 0; w < 32; ++w) memory.write(0, 4 * w, &value, 4);
    memory.barrier();
    try {
      misuse(memory);
    } catch (const std::logic_error&) {
      return;
    }
    throw std::logic_error(std::string("was not caught: ") + what);
  };
  float value = 2;
  unsigned char chunk[kChunkBytes] = {};
  caught("read of another thread's write without a barrier", [&](SimulatedMemory& m) {
    m.write(1, 8, &value, 4);
    m.read(2, 8, &value, 4);
  });
  caught("overwriting what another thread reads", [&](SimulatedMemory& m) {
    m.read(1, 8, &value, 4);
    m.write(2, 8, &value, 4);
  });
  caught("overwriting what several threads read", [&](SimulatedMemory& m) {
    m.read(1, 8, &value, 4);
    m.read(2, 8, &value, 4);
    m.write(1, 8, &value, 4);
  });
  caught("a copy onto what is read", [&](SimulatedMemory& m) {
    m.read(1, 20, &value, 4);
    m.begin_copy(2, 16);
  });
  caught("read of a copy that is under way", [&](SimulatedMemory& m) {
    m.begin_copy(2, 16);
    m.barrier();
    m.read(2, 16, &value, 4);
  });
  caught("read of another thread's copy without a barrier", [&](SimulatedMemory& m) {
    m.begin_copy(2, 16);
    m.barrier();
    m.end_copy(2, 16, chunk);
    m.read(3, 16, &value, 4);
  });
  caught("read of what was never written", [&](SimulatedMemory& m) { m.read(0, 252, &value, 4); });
  caught("a place outside", [&](SimulatedMemory& m) { m.begin_copy(0, 256); });
  caught("a place that is not aligned", [&](SimulatedMemory& m) { m.begin_copy(0, 8); });
  SimulatedMemory memory(64);
  memory.begin_copy(0, 16);
  memory.end_copy(0, 16, chunk);
  memory.read(0, 16, &value, 4);
  memory.barrier();
  memory.read(1, 16, &value, 4);
  memory.barrier();
  memory.begin_copy(1, 16);
}

void instances() {
  std::printf("%d instances\n", kInstanceCount);
  require(kInstanceCount <= 40, "more than 40 instances");
  require(choose_tile(100000, 32, 1, 132) == TileShape::kThin, "few columns want the thin tile");
  require(choose_tile(100000, 256, 1, 132) == TileShape::kLarge, "many tiles want to be large");
  require(choose_tile(49, 2048, 1, 132) == TileShape::kSmall, "few rows want small tiles");
  require(choose_tile(100000, 64, 1, 132) == TileShape::kSmall, "half of a large tile would be empty");
  require(choose_tile(196, 256, 64, 132) == TileShape::kLarge, "images count as tiles");
  require(choose_weight_tile(256, 64) == TileShape::kSmall && choose_weight_tile(65, 65) == TileShape::kLarge,
          "tiles of the weight's gradient differ");
}

}  // namespace
}  // namespace bap_kernels

int main(int count, char** arguments) {
  using namespace bap_kernels;
  const std::map<std::string, void (*)()> checks = {
      {"forward_axes", forward_axes},
      {"gradient_axes", gradient_axes},
      {"tile_order", tile_order},
      {"row_places", row_places},
      {"steps", steps_of_the_sum},
      {"lists", lists},
      {"copies", copies},
      {"banks", banks},
      {"stages", stages},
      {"conversions", conversions},
      {"memory_rules", memory_rules},
      {"instances", instances},
  };
  if (count != 2 || checks.count(arguments[1]) == 0) {
    for (const auto& [name, check] : checks) std::printf("%s\n", name.c_str());
    return 2;
  }
  try {
    checks.at(arguments[1])();
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", arguments[1], error.what());
    return 1;
  }
  return 0;
}
