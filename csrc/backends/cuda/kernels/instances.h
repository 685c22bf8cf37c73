// The instances of the convolution kernels: tiles, in each math mode; and what a launcher chooses from them.
#pragma once

#include "backends/cuda/kernels/tile_layout.h"

namespace bap_kernels {

// The math mode of a kernel: the type that the tensor cores multiply. There is none for IEEE float32: sums of products
// of TF32 parts would miss it, since tensor cores truncate what they add. Each has a file gathered_conv2d_<name>.cu.
enum class MathMode : int { kBFloat16, kHalf, kTf32 };

// Rows, columns, warps along rows, along columns, stages, blocks that an SM should hold. Planar sources and the
// weight's gradient have no thin tiles: pointwise layers with few filters are rare.
using LargeTile = Tile<128, 128, 2, 4, 3, 1>;
using SmallTile = Tile<64, 64, 2, 2, 4, 2>;
using ThinTile = Tile<128, 32, 4, 1, 4, 2>;
enum class TileShape : int { kLarge, kSmall, kThin };
// Of the forward that loads a halo once for all taps.
using LargeHaloTile = Tile<128, 128, 2, 4, 2, 1>;
using SmallHaloTile = Tile<64, 64, 2, 2, 3, 1>;
enum class HaloTileShape : int { kLarge, kSmall };
// Of WGMMA, for the 16-bit math modes: the warps are those that multiply.
using WideWarpgroupTile = Tile<128, 256, 8, 1, 4, 1>;
using SquareWarpgroupTile = Tile<128, 128, 8, 1, 6, 1>;
enum class WarpgroupTileShape : int { kWide, kSquare };
// Of the kernel that adds the parts of a sum: small, so that few pixels make many blocks.
using SplitEpilogueTile = Tile<16, 64, 1, 4, 1, 1>;

inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }
// Tiles of a result of rows x columns in each of `grids` grids.
template <class Tile>
int64_t tiles_of(int64_t rows, int64_t columns, int64_t grids) {
  return tiles_of(rows, Tile::kRows) * tiles_of(columns, Tile::kColumns) * grids;
}
inline int64_t tiles_of(TileShape tile, int64_t rows, int64_t columns, int64_t grids) {
  return tile == TileShape::kLarge   ? tiles_of<LargeTile>(rows, columns, grids)
         : tile == TileShape::kSmall ? tiles_of<SmallTile>(rows, columns, grids)
                                     : tiles_of<ThinTile>(rows, columns, grids);
}

// How many parts a sum of so many steps is cut into, each for a block of its own (split-K): where the tiles leave more
// than half of the SMs idle and the sum is long enough to pay for a second launch.
inline int choose_parts(int64_t tiles, int64_t steps, int sm_count) {
  constexpr int64_t kLongSum = 16, kLeastSteps = 4;
  if (tiles == 0 || 2 * tiles >= sm_count || steps < kLongSum) return 1;
  const int64_t fill = sm_count / tiles, most = steps / kLeastSteps;
  return static_cast<int>(fill < most ? fill : most);
}

// The tile for a result of rows x columns in each of `grids` grids: narrow ones where few columns would leave most of
// a tile empty (not of planar sources), large ones where they fill the device. By WGMMA, `warpgroups`, half of it is
// enough, with the parts of sums of so many steps: a large tile brings half as many bytes for each product as a small
// one, and those limit both.
inline TileShape choose_tile(int64_t rows, int64_t columns, int64_t grids, bool planes, int sm_count,
                             bool warpgroups = false, int64_t steps = 0) {
  if (!planes && columns <= ThinTile::kColumns) return TileShape::kThin;
  const int64_t large = tiles_of<LargeTile>(rows, columns, grids);
  // Half of a large tile's rows or columns would be empty.
  const bool fits = 2 * columns > LargeTile::kColumns && 2 * rows > LargeTile::kRows;
  const bool fills = warpgroups ? 2 * large * choose_parts(large, steps, sm_count) > sm_count : large >= sm_count;
  return fits && fills ? TileShape::kLarge : TileShape::kSmall;
}

// The same of warpgroups, which take what would else get large tiles: the wide one where it pads no further and fills
// the device, too.
inline WarpgroupTileShape choose_warpgroup_tile(int64_t rows, int64_t columns, int64_t grids, int sm_count) {
  using Wide = WideWarpgroupTile;
  using Square = SquareWarpgroupTile;
  const int64_t wide = tiles_of(columns, Wide::kColumns), square = tiles_of(columns, Square::kColumns);
  const bool even = wide * Wide::kColumns == square * Square::kColumns;
  return even && tiles_of(rows, Wide::kRows) * wide * grids >= sm_count ? WarpgroupTileShape::kWide
                                                                        : WarpgroupTileShape::kSquare;
}

// The same for the weight's gradient.
inline TileShape choose_weight_tile(int64_t rows, int64_t columns) {
  return rows > SmallTile::kRows && columns > SmallTile::kColumns ? TileShape::kLarge : TileShape::kSmall;
}

}  // namespace bap_kernels
