// The halo of a tile of result pixels: which source pixels its taps meet, where they lie in shared memory, and which
// tile suits a layer.
//
// A tile is tile_h x tile_w pixels of one image. Its halo holds each source pixel that some tap meets once: `rows` rows
// of `line` places, and at a place the channels of one block, 128 bytes. The columns of a row are ordered by their
// remainder in the stride, so that neighbouring result pixels meet neighbouring places at every tap:
//   place(column) = column mod stride * phase + column / stride        with `phase` columns of each remainder
// What a planar source brings is staged before, as it lies there: for each channel `rows` rows of `units` copies.
#pragma once

#include <initializer_list>

#include "backends/cuda/kernels/conv_params.h"
#include "backends/cuda/kernels/instances.h"

namespace bap_kernels {

// Every device of the kernels gives a block this much shared memory (the least is that of compute capability 8.6).
constexpr int kHaloSharedBytes = 99 * 1024;
// Of few channels no whole block is staged, but a multiple of this many: whole chunks of every element type.
constexpr int kStagedChannels = 8;

struct HaloShape {
  int tile_h, tile_w_log, tile_w;
  int rows, columns, phase, line;
  int copy_bytes;         // of one copy of the staged source; 0: elements are gathered without staging
  int unit, units, lead;  // elements of a copy; copies of a row; elements before the first column in the first copy
  int staged_channels;    // of a block, that are staged

  BAP_HOST_DEVICE int pixels() const { return rows * line; }
  BAP_HOST_DEVICE int row_bytes() const { return units * copy_bytes; }
  BAP_HOST_DEVICE int staged_bytes() const { return staged_channels * rows * row_bytes(); }
};

BAP_HOST_DEVICE int halo_place(const HaloShape& s, int stride, int column) {
  return column % stride * s.phase + column / stride;
}
// The column at a place; one of `columns` or more where there is none.
BAP_HOST_DEVICE int halo_column(const HaloShape& s, int stride, int place) {
  int remainder = 0;
  while (place >= s.phase) place -= s.phase, ++remainder;
  return place * stride + remainder;
}

// The pixel of the halo that row m of the tile meets at the first tap, and how much further on it meets another.
BAP_HOST_DEVICE int halo_pixel(const HaloShape& s, int stride_h, int m) {
  return (m >> s.tile_w_log) * stride_h * s.line + (m & (s.tile_w - 1));
}
BAP_HOST_DEVICE int halo_tap(const HaloShape& s, const ConvAxis& h, const ConvAxis& w, const Divisor& stride_w,
                             int tap_h, int tap_w) {
  const int column = tap_w * w.dilation, line = stride_w.quotient(column);
  return tap_h * h.dilation * s.line + stride_w.rest(column, line) * s.phase + line;
}

// The shape of a tile of 2^tile_w_log columns, whose source is staged by copies of `copy_bytes`; 0: it is not staged.
BAP_HOST_DEVICE HaloShape halo_shape(const ConvAxis& h, const ConvAxis& w, int tile_pixels, int tile_w_log,
                                     int element_bytes, int copy_bytes, int depth) {
  HaloShape s{};
  s.tile_w_log = tile_w_log;
  s.tile_w = 1 << tile_w_log;
  s.tile_h = tile_pixels >> tile_w_log;
  s.rows = (s.tile_h - 1) * h.stride + (h.kernel - 1) * h.dilation + 1;
  s.columns = (s.tile_w - 1) * w.stride + (w.kernel - 1) * w.dilation + 1;
  s.phase = ceil_div(s.columns, w.stride);
  s.line = s.phase * w.stride;
  s.copy_bytes = copy_bytes;
  if (copy_bytes > 0) {
    const int block = kDepthBytes / element_bytes;
    s.unit = copy_bytes / element_bytes;
    // Tiles are a multiple of 8 pixels wide, and no copy is wider than 8: each starts as far from a multiple of `unit`.
    s.lead = (s.unit - w.before % s.unit) % s.unit;
    s.units = ceil_div(s.lead + s.columns, s.unit);
    s.staged_channels = depth >= block ? block : ceil_div(depth, kStagedChannels) * kStagedChannels;
  }
  return s;
}

// The parts of shared memory: stages of the weight, the halo, the staged source.
template <class Tile>
struct HaloMemory {
  static constexpr int kStageBytes = Tile::kColumns * kDepthBytes;
  static constexpr int kHaloAt = Tile::kStages * kStageBytes;
  BAP_HOST_DEVICE static int staged_at(const HaloShape& s) { return kHaloAt + s.pixels() * kDepthBytes; }
  BAP_HOST_DEVICE static int bytes(const HaloShape& s) {
    const int sum = staged_at(s) + s.staged_bytes();
    return sum > Tile::kEpilogueBytes ? sum : Tile::kEpilogueBytes;
  }
};

// Bytes of the widest copy of a planar source that starts aligned wherever it starts, from the address and the strides
// in bytes that are stepped along; 0: only single elements are, or pixels do not lie side by side.
inline int halo_copy_bytes(uint64_t address, const Strides& stride, int element_bytes) {
  if (stride.w != 1) return 0;
  const uint64_t bytes = static_cast<uint64_t>(element_bytes);
  const uint64_t bits = address | static_cast<uint64_t>(stride.n) * bytes | static_cast<uint64_t>(stride.c) * bytes |
                        static_cast<uint64_t>(stride.h) * bytes;
  for (const int width : {16, 8, 4}) {
    if (bits % static_cast<uint64_t>(width) == 0) return width;
  }
  return 0;
}

// The forward by halo_conv2d.cuh.
struct HaloParams {
  ConvParams conv;
  HaloShape shape;
  bool planes, planar_result;  // whether pixels lie side by side in source and result, not channels
  bool prologue;
  int tiles;                  // of an image; this and what follows is filled in by the launch
  Divisor tiles_w, stride_w;  // of them along w
};

// What a layer asks of the halo kernel.
struct HaloCase {
  ConvAxis h, w;
  int batch, columns, depth;
  int element_bytes, copy_bytes;
  bool planes;  // whether the source's pixels lie side by side, not its channels
};

inline HaloCase halo_case(const ConvParams& p, uint64_t address, int element_bytes) {
  const int copy_bytes = halo_copy_bytes(address, p.source_stride, element_bytes);
  int depth = 0;
  for (int run = 0; run < p.runs.count; ++run) depth = p.runs.of[run].depth > depth ? p.runs.of[run].depth : depth;
  return {p.axis_h, p.axis_w, p.batch, p.columns, depth, element_bytes, copy_bytes, p.source_stride.w == 1};
}

struct HaloChoice {
  bool fits;  // whether the kernel takes the case
  HaloTileShape tile;
  HaloShape shape;
  int shared_bytes;
};

// Pixels of result and halo that the tiles of a shape compute and load: the part of the work that the shape decides.
inline int64_t halo_work(const HaloCase& c, const HaloShape& s) {
  const int64_t tiles = int64_t{ceil_div(c.h.output, s.tile_h)} * ceil_div(c.w.output, s.tile_w);
  return tiles * (int64_t{s.tile_h} * s.tile_w * c.h.kernel * c.w.kernel + s.pixels());
}

// The best shape of one tile: staged if that fits, of the least work.
template <class Tile>
HaloChoice choose_halo_shape(const HaloCase& c, HaloTileShape tile) {
  HaloChoice best{};
  for (const int copy_bytes : {c.copy_bytes, 0}) {
    for (int log = 3; (1 << log) <= Tile::kRows; ++log) {
      const HaloShape s = halo_shape(c.h, c.w, Tile::kRows, log, c.element_bytes, copy_bytes, c.depth);
      const int bytes = HaloMemory<Tile>::bytes(s);
      if (bytes > kHaloSharedBytes) continue;
      if (!best.fits || halo_work(c, s) < halo_work(c, best.shape)) best = {true, tile, s, bytes};
    }
    if (best.fits) break;
  }
  return best;
}

// A host's choice: whether the halo kernel takes a forward that would otherwise copy its channels first, and its tile.
// It takes several taps whose halo fits. Without planes every tile of columns gathers the halo again, element by
// element, which more than two of them make dearer than one compact copy.
inline HaloChoice choose_halo(const HaloCase& c, int sm_count) {
  const bool taps = c.h.kernel * c.w.kernel > 1 && c.h.kernel <= 7 && c.w.kernel <= 7;
  if (!taps || (!c.planes && c.columns > 2 * SmallHaloTile::kColumns)) return {};
  const HaloChoice small = choose_halo_shape<SmallHaloTile>(c, HaloTileShape::kSmall);
  if (2 * c.columns <= LargeHaloTile::kColumns) return small;
  const HaloChoice large = choose_halo_shape<LargeHaloTile>(c, HaloTileShape::kLarge);
  if (!large.fits) return small;
  const int64_t blocks = int64_t{ceil_div(c.h.output, large.shape.tile_h)} * ceil_div(c.w.output, large.shape.tile_w) *
                         ceil_div(c.columns, LargeHaloTile::kColumns) * c.batch;
  const bool idle = blocks < sm_count || 4 * halo_work(c, large.shape) > 5 * halo_work(c, small.shape);
  // Staging hides the loads, which counts for more than larger tiles.
  const bool staged = large.shape.copy_bytes > 0 || small.shape.copy_bytes == 0;
  return small.fits && (idle || !staged) ? small : large;
}

}  // namespace bap_kernels
