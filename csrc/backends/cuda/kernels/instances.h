// The instances of the convolution kernels, as data: each math mode has these tiles; and what a launcher chooses
// from them.
#pragma once

#include "backends/cuda/kernels/elements.h"
#include "backends/cuda/kernels/tile_layout.h"

namespace bap_kernels {

// name, rows, columns, warps along rows, along columns, stages, blocks that an SM should hold
#define BAP_KERNELS_TILES(X)     \
  X(Large, 128, 128, 2, 4, 3, 1) \
  X(Small, 64, 64, 2, 2, 4, 2)   \
  X(Thin, 128, 32, 4, 1, 4, 2)
// Those of planar sources. Pointwise layers with few filters are rare, and a tile of their own is what the fewest
// layers would miss.
#define BAP_KERNELS_PLANES_TILES(X) \
  X(Large, 128, 128, 2, 4, 3, 1)    \
  X(Small, 64, 64, 2, 2, 4, 2)
// Those of the weight's gradient, whose columns are input channels.
#define BAP_KERNELS_WEIGHT_TILES(X) \
  X(Large, 128, 128, 2, 4, 3, 1)    \
  X(Small, 64, 64, 2, 2, 4, 2)
// Those of the forward that loads a halo once for all taps.
#define BAP_KERNELS_HALO_TILES(X) \
  X(Large, 128, 128, 2, 4, 2, 1)  \
  X(Small, 64, 64, 2, 2, 3, 1)
// Those of WGMMA, for the 16-bit math modes: the warps are those that multiply.
#define BAP_KERNELS_WARPGROUP_TILES(X) \
  X(Wide, 128, 256, 8, 1, 4, 1)        \
  X(Square, 128, 128, 8, 1, 6, 1)
// Each has a file gathered_conv2d_<name>.cu, so that they compile side by side.
#define BAP_KERNELS_MATH_MODES(X) X(BFloat16) X(Half) X(Tf32)

#define BAP_KERNELS_ENUM(name, ...) k##name,
enum class TileShape : int { BAP_KERNELS_TILES(BAP_KERNELS_ENUM) };
enum class HaloTileShape : int { BAP_KERNELS_HALO_TILES(BAP_KERNELS_ENUM) };
enum class WarpgroupTileShape : int { BAP_KERNELS_WARPGROUP_TILES(BAP_KERNELS_ENUM) };
#undef BAP_KERNELS_ENUM
#define BAP_KERNELS_TYPE(name, rows, columns, warps_m, warps_n, stages, blocks) \
  using name##Tile = Tile<rows, columns, warps_m, warps_n, stages, blocks>;
BAP_KERNELS_TILES(BAP_KERNELS_TYPE)
#undef BAP_KERNELS_TYPE
#define BAP_KERNELS_TYPE(name, rows, columns, warps_m, warps_n, stages, blocks) \
  using name##HaloTile = Tile<rows, columns, warps_m, warps_n, stages, blocks>;
BAP_KERNELS_HALO_TILES(BAP_KERNELS_TYPE)
#undef BAP_KERNELS_TYPE
#define BAP_KERNELS_TYPE(name, rows, columns, warps_m, warps_n, stages, blocks) \
  using name##WarpgroupTile = Tile<rows, columns, warps_m, warps_n, stages, blocks>;
BAP_KERNELS_WARPGROUP_TILES(BAP_KERNELS_TYPE)
#undef BAP_KERNELS_TYPE

#define BAP_KERNELS_COUNT(...) +1
constexpr int kTileCount = 0 BAP_KERNELS_TILES(BAP_KERNELS_COUNT);
constexpr int kPlanesTileCount = 0 BAP_KERNELS_PLANES_TILES(BAP_KERNELS_COUNT);
constexpr int kWarpgroupTileCount = 0 BAP_KERNELS_WARPGROUP_TILES(BAP_KERNELS_COUNT);
constexpr int kWeightTileCount = 0 BAP_KERNELS_WEIGHT_TILES(BAP_KERNELS_COUNT);
constexpr int kHaloTileCount = 0 BAP_KERNELS_HALO_TILES(BAP_KERNELS_COUNT);
constexpr int kModeCount = 0 BAP_KERNELS_MATH_MODES(BAP_KERNELS_COUNT);
#undef BAP_KERNELS_COUNT
// Two of the math modes are of 16 bits.
constexpr int kInstanceCount =
    kModeCount * (kTileCount + kPlanesTileCount + kWeightTileCount + kHaloTileCount) + 2 * kWarpgroupTileCount;

inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// The tile for a result of rows x columns in each of `grids` grids: narrow ones where few columns would leave most of
// a tile empty (not of planar sources), large ones where they fill the device.
inline TileShape choose_tile(int64_t rows, int64_t columns, int64_t grids, bool planes, int sm_count) {
  if (!planes && columns <= ThinTile::kColumns) return TileShape::kThin;
  const int64_t large = tiles_of(rows, LargeTile::kRows) * tiles_of(columns, LargeTile::kColumns) * grids;
  // Half of a large tile's rows or columns would be empty.
  const bool fits = 2 * columns > LargeTile::kColumns && 2 * rows > LargeTile::kRows;
  return fits && large >= sm_count ? TileShape::kLarge : TileShape::kSmall;
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
