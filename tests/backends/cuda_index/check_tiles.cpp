// Copies, swizzles, staged results and the choice of a tile.
#include "check.h"

namespace bap_kernels {
namespace {

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
    // Two words of a row are stored at once, half a warp at a time.
    if (lane < 16) pairs.push_back(SmallTile::staged(false, fragment_row_c(lane, 0), fragment_column_c(lane, 0)) * 4);
    words.push_back(SmallTile::staged(true, fragment_row_c(lane, 0), fragment_column_c(lane, 0)) * 4);
  }
  require(busiest_bank(pairs, 8) == 1, "staged pairs share a bank");
  require(busiest_bank(words, 4) == 1, "staged words share a bank");
}

void stages() {
  for_tiles([](const std::string& name, auto tile) {
    using Tile = decltype(tile);
    std::set<int> rows, planes;
    for (int i = 0; i < Tile::kRows; ++i) {
      for (int j = 0; j < Tile::kColumns; ++j) {
        rows.insert(Tile::staged(false, i, j));
        planes.insert(Tile::staged(true, i, j));
      }
    }
    const size_t count = Tile::kRows * Tile::kColumns;
    require(rows.size() == count && planes.size() == count, name + ": two staged results share a place");
    require(*rows.rbegin() * 4 < Tile::kTableAt && *planes.rbegin() * 4 < Tile::kTableAt,
            name + ": staged results reach into the table");
    // The least that an SM of the kernels' devices gives a block (compute capability 8.6).
    require(Tile::kSharedBytes <= 99 * 1024, name + ": more shared memory than every device has");
  });
}

void parts() {
  // ResNet-50's last 3x3, batch 1: 8 small tiles, 72 steps.
  require(choose_parts(8, 72, 132) == 16, "parts fill the SMs once");
  require(choose_parts(8, 32, 132) == 8, "a part has at least four steps");
  require(choose_parts(8, 16, 132) == 4 && choose_parts(8, 15, 132) == 1, "short sums are not cut");
  require(choose_parts(65, 72, 132) == 2 && choose_parts(66, 72, 132) == 1, "tiles that fill half the SMs are whole");
  require(choose_parts(0, 72, 132) == 1, "an empty result has no parts");
  for (int tiles = 1; tiles < 300; ++tiles) {
    for (int steps = 0; steps < 300; ++steps) {
      const int count = choose_parts(tiles, steps, 132);
      require(count == 1 || (count * tiles <= 132 && count * 4 <= steps), "more parts than SMs or steps");
    }
  }
}

void choices() {
  require(choose_tile(100000, 32, 1, false, 132) == TileShape::kThin, "few columns want the thin tile");
  require(choose_tile(100000, 256, 1, false, 132) == TileShape::kLarge, "many tiles want to be large");
  require(choose_tile(49, 2048, 1, false, 132) == TileShape::kSmall, "few rows want small tiles");
  require(choose_tile(100000, 64, 1, false, 132) == TileShape::kSmall, "half of a large tile would be empty");
  require(choose_tile(196, 256, 64, false, 132) == TileShape::kLarge, "images count as tiles");
  // ResNet-50's last 3x3, batch 64: 25 x 4 large tiles.
  require(choose_tile(64 * 49, 512, 1, false, 132) == TileShape::kSmall, "large tiles leave SMs idle");
  require(choose_tile(64 * 49, 512, 1, false, 132, true) == TileShape::kLarge, "WGMMA takes what fills half the SMs");
  require(choose_tile(16 * 128, 512, 1, false, 128, true) == TileShape::kSmall, "half of the SMs, and no more");
  // The same with batch 8, in parts: 4 x 4 large tiles, 72 steps.
  require(choose_tile(8 * 49, 512, 1, false, 132, true, 72) == TileShape::kLarge, "parts count as tiles for WGMMA");
  require(choose_tile(8 * 49, 512, 1, false, 132, true, 15) == TileShape::kSmall, "there are no parts of short sums");
  require(choose_tile(8 * 49, 512, 1, false, 132, false, 72) == TileShape::kSmall, "parts are for WGMMA alone");
  require(choose_tile(100000, 32, 1, true, 132) == TileShape::kSmall, "planar sources have no thin tile");
  require(choose_warpgroup_tile(100000, 256, 1, 132) == WarpgroupTileShape::kWide, "many columns want the wide tile");
  require(choose_warpgroup_tile(100000, 128, 1, 132) == WarpgroupTileShape::kSquare, "half of it would be empty");
  require(choose_warpgroup_tile(100000, 384, 1, 132) == WarpgroupTileShape::kSquare, "a quarter of it would be empty");
  require(choose_warpgroup_tile(128 * 100, 256, 1, 132) == WarpgroupTileShape::kSquare, "wide tiles fill no device");
  require(choose_weight_tile(256, 64) == TileShape::kSmall && choose_weight_tile(65, 65) == TileShape::kLarge,
          "tiles of the weight's gradient differ");
}

}  // namespace

Checks tile_checks() {
  return {{"copies", copies}, {"banks", banks}, {"stages", stages}, {"parts", parts}, {"choices", choices}};
}

}  // namespace bap_kernels
