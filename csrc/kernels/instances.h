// The instances of the convolution kernels, as data: each kind of products has these tiles, in both layouts of the
// source; and what a launcher chooses from them.
#pragma once

#include "kernels/elements.h"
#include "kernels/tile_layout.h"

namespace bap_kernels {

// name, rows, columns, warps along rows, along columns, stages, blocks that a processor should hold
#define BAP_KERNELS_TILES(X)     \
  X(Large, 128, 128, 2, 4, 3, 1) \
  X(Small, 64, 64, 2, 2, 4, 2)   \
  X(Thin, 128, 32, 4, 1, 4, 2)
// Those of the weight's gradient, whose columns are input channels.
#define BAP_KERNELS_WEIGHT_TILES(X) \
  X(Large, 128, 128, 2, 4, 3, 1)    \
  X(Small, 64, 64, 2, 2, 4, 2)
// Those of the forward that loads a halo once for all taps.
#define BAP_KERNELS_HALO_TILES(X) \
  X(Large, 128, 128, 2, 4, 2, 1)  \
  X(Small, 64, 64, 2, 2, 3, 1)
// Each has a file gathered_conv2d_<name>.cu, so that they compile side by side.
#define BAP_KERNELS_PRODUCTS(X) X(BFloat16) X(Half) X(Tf32) X(Float32)

#define BAP_KERNELS_ENUM(name, ...) k##name,
enum class TileShape : int { BAP_KERNELS_TILES(BAP_KERNELS_ENUM) };
enum class HaloTileShape : int { BAP_KERNELS_HALO_TILES(BAP_KERNELS_ENUM) };
#undef BAP_KERNELS_ENUM
#define BAP_KERNELS_TYPE(name, rows, columns, warps_m, warps_n, stages, blocks) \
  using name##Tile = Tile<rows, columns, warps_m, warps_n, stages, blocks>;
BAP_KERNELS_TILES(BAP_KERNELS_TYPE)
#undef BAP_KERNELS_TYPE
#define BAP_KERNELS_TYPE(name, rows, columns, warps_m, warps_n, stages, blocks) \
  using name##HaloTile = Tile<rows, columns, warps_m, warps_n, stages, blocks>;
BAP_KERNELS_HALO_TILES(BAP_KERNELS_TYPE)
#undef BAP_KERNELS_TYPE

#define BAP_KERNELS_COUNT(...) +1
constexpr int kTileCount = 0 BAP_KERNELS_TILES(BAP_KERNELS_COUNT);
constexpr int kWeightTileCount = 0 BAP_KERNELS_WEIGHT_TILES(BAP_KERNELS_COUNT);
constexpr int kHaloTileCount = 0 BAP_KERNELS_HALO_TILES(BAP_KERNELS_COUNT);
constexpr int kProductsCount = 0 BAP_KERNELS_PRODUCTS(BAP_KERNELS_COUNT);
#undef BAP_KERNELS_COUNT
// Two layouts of the source in the forward.
constexpr int kInstanceCount = kProductsCount * (2 * kTileCount + kWeightTileCount + kHaloTileCount);

// The tile for a result of rows x columns in each of `planes` grids: narrow ones where few columns would leave most of
// a tile empty, large ones where they fill the device.
inline TileShape choose_tile(int64_t rows, int64_t columns, int64_t planes, int processors) {
  if (columns <= ThinTile::kColumns) return TileShape::kThin;
  const auto tiles = [](int64_t size, int64_t of) { return (size + of - 1) / of; };
  const int64_t large = tiles(rows, LargeTile::kRows) * tiles(columns, LargeTile::kColumns) * planes;
  // Half of a large tile's rows or columns would be empty.
  const bool fits = 2 * columns > LargeTile::kColumns && 2 * rows > LargeTile::kRows;
  return fits && large >= processors ? TileShape::kLarge : TileShape::kSmall;
}

// The same for the weight's gradient.
inline TileShape choose_weight_tile(int64_t rows, int64_t columns) {
  return rows > SmallTile::kRows && columns > SmallTile::kColumns ? TileShape::kLarge : TileShape::kSmall;
}

}  // namespace bap_kernels
