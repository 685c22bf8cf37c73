// Tiles of a tensor for Winograd's transforms: how a call is cut into blocks of them, and where their pixels' listed
// channels lie side by side.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "backends/cpu/isa.h"
#include "backends/cpu/microkernels/winograd.h"

namespace bap_kernels {

// Rows and columns of tiles of consecutive images.
struct TileBlock {
  int64_t first_image, images, first_row, rows, first_column, columns;
  int64_t tiles() const { return images * rows * columns; }
};

// All tiles in blocks of at most `most`, the number of blocks a multiple of `shared` where that is possible.
std::vector<TileBlock> cut_tiles(int64_t batch, int64_t rows, int64_t columns, int64_t most, int64_t shared);

// Pixels that tiles overlap. Strides are in elements.
struct TileSource {
  const float* data;
  int64_t stride_n, stride_c, stride_h, stride_w, height, width;
  int64_t pad_top, pad_left;        // of the first tile
  const int32_t* list;              // null: all
  int64_t count;                    // channels that are read
  int64_t step, edge;               // pixels from tile to tile, and of a tile, in rows and columns
  const int64_t* images = nullptr;  // where each image lies, counted in images; null: one after the other
  int64_t all_channels = 0;         // of a pixel, whether listed or not; 0: unknown
  // What follows is found by plan().
  int64_t channels = 0;  // `count` as whole vectors, and whole groups of planes
  bool in_place = false;
  std::vector<micro::GatherMove> moves;
  ChannelGatherKernel gather;  // empty where the table's gather is the one to use
  std::vector<micro::GatherStep> gather_steps;

  // `copied`: whether pixels are copied in any case.
  void plan(bool copied);
  int64_t channel(int64_t i) const { return list ? list[i] : i; }
};

// The first channel of each point of each tile, [tile][point]: in place, in the thread's memory, or zeros outside the
// image. `change(pixels, count)` is called on what was copied.
std::vector<const float*> tile_points(const TileSource& source, const TileBlock& block,
                                      const std::function<void(float*, int64_t)>& change = {});

// Floats from point to point of transformed tiles, [point][channel / lanes][tile][lanes].
int64_t point_step_of(int64_t channels, int64_t tiles);

}  // namespace bap_kernels
