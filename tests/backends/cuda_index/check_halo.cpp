// The halo of a tile: places, taps, staged planes, banks, and the host's choice, against plain loops.
#include "backends/cuda/kernels/halo_shape.h"

#include "check.h"

namespace bap_kernels {
namespace {

// Every axis with every width of a tile: body(shape, axis), the axis along both directions.
template <class Body>
void for_shapes(Body body) {
  for (const int copy_bytes : {0, 4, 8, 16}) {
    for (const int element_bytes : {2, 4}) {
      for (int log = 3; log <= 5; ++log) {
        for_axes([&](const ConvAxis& a) {
          body(halo_shape(a, a, 64, log, element_bytes, copy_bytes, 40), a, element_bytes);
        });
      }
    }
  }
}

void halo_places() {
  for_shapes([](const HaloShape& s, const ConvAxis& a, int) {
    std::set<int> places;
    for (int column = 0; column < s.columns; ++column) {
      const int place = halo_place(s, a.stride, column);
      require(place >= 0 && place < s.line, "a column lies outside its row");
      require(halo_column(s, a.stride, place) == column, "a place does not lead back to its column");
      places.insert(place);
    }
    require(static_cast<int>(places.size()) == s.columns, "two columns share a place");
    for (int place = 0; place < s.line; ++place) {
      require(places.count(place) || halo_column(s, a.stride, place) >= s.columns, "an empty place has a column");
    }
  });
}

void halo_taps() {
  for_shapes([](const HaloShape& s, const ConvAxis& a, int) {
    std::set<int> rows, columns;
    for (int m = 0; m < 64; ++m) {
      const int r = m / s.tile_w, c = m % s.tile_w;
      for (int h = 0; h < a.kernel; ++h) {
        for (int w = 0; w < a.kernel; ++w) {
          const int pixel = halo_pixel(s, a.stride, m) + halo_tap(s, a, a, divisor_of(a.stride), h, w);
          require(pixel >= 0 && pixel < s.pixels(), "a tap reads outside the halo");
          const int row = pixel / s.line, column = halo_column(s, a.stride, pixel % s.line);
          // The halo's first pixel is the first one's first tap.
          require(row == r * a.stride + h * a.dilation, "a tap meets another row");
          require(column == c * a.stride + w * a.dilation, "a tap meets another column");
          rows.insert(row), columns.insert(column);
        }
      }
    }
    require(*rows.rbegin() == s.rows - 1 && *columns.rbegin() == s.columns - 1, "the halo is larger than it need be");
  });
}

void halo_staging() {
  for_shapes([](const HaloShape& s, const ConvAxis& a, int element_bytes) {
    if (s.copy_bytes < element_bytes) return;
    const int block = kDepthBytes / element_bytes;
    require(s.staged_channels >= std::min(40, block) && s.staged_channels <= block, "staged channels differ");
    require(s.staged_channels % (kChunkBytes / element_bytes) == 0, "part of a chunk is staged");
    require(s.unit * element_bytes == s.copy_bytes && s.lead >= 0 && s.lead < s.unit, "the first copy differs");
    require(s.units * s.unit >= s.lead + s.columns, "a row's end is not staged");
    require((s.units - 1) * s.unit < s.lead + s.columns, "more is staged than the row");
    for (int tile = 0; tile < 3; ++tile) {
      const int first = tile * s.tile_w * a.stride - a.before - s.lead;
      // Copies start on multiples of their length, so that none reaches over the left edge.
      require(first % s.unit == 0, "a copy is not aligned");
    }
  });
}

void halo_banks() {
  for_shapes([](const HaloShape& s, const ConvAxis& a, int) {
    for (int h = 0; h < a.kernel; ++h) {
      for (int w = 0; w < a.kernel; ++w) {
        for (int first = 0; first < 64; first += 8) {
          std::vector<int> rows;
          for (int m = first; m < first + 8; ++m) {
            rows.push_back(by_rows(halo_pixel(s, a.stride, m) + halo_tap(s, a, a, divisor_of(a.stride), h, w), 3));
          }
          require(busiest_bank(rows, kChunkBytes) == 1, "the rows of a matrix share a bank");
        }
      }
    }
  });
}

HaloCase layer(int size, int kernel, int stride, int columns, int depth = 256, int batch = 64) {
  const ConvAxis axis{size, ceil_div(size, stride), kernel, stride, kernel / 2, 1};
  return {axis, axis, batch, columns, depth, 2, 16, true};
}

void halo_limits() {
  for (const int kernel : {2, 3, 5, 7}) {
    for (const int stride : {1, 2, 3}) {
      for (const int size : {7, 14, 28, 56}) {
        for (const int copy_bytes : {0, 4, 8, 16}) {
          for (const int element_bytes : {2, 4}) {
            for (const int columns : {1, 64, 65, 128, 512}) {
              HaloCase c = layer(size, kernel, stride, columns);
              c.copy_bytes = copy_bytes, c.element_bytes = element_bytes;
              const HaloChoice few = choose_halo(c, 1), many = choose_halo(c, 1 << 20);
              // 26 x 27 places of 128 bytes and more are too many beside the weight.
              const bool fits = kernel < 5 || stride < 3;
              require(few.fits == fits && many.fits == fits, "the layers that fit differ");
              if (!fits) continue;
              require(many.tile == HaloTileShape::kSmall, "an idle device wants small tiles");
              for (const HaloChoice& choice : {few, many}) {
                const HaloShape& s = choice.shape;
                const int rows = choice.tile == HaloTileShape::kLarge ? LargeHaloTile::kRows : SmallHaloTile::kRows;
                require(s.tile_h * s.tile_w == rows && s.tile_w % 8 == 0, "a tile is not full");
                require(choice.shared_bytes <= kHaloSharedBytes, "more shared memory than every device has");
                require(choice.shared_bytes >= s.pixels() * kDepthBytes + s.staged_bytes(), "memory is missing");
                require(s.copy_bytes == 0 || s.copy_bytes == copy_bytes, "copies are not as wide as the planes allow");
              }
            }
          }
        }
      }
    }
  }
}

void halo_choice() {
  const HaloChoice usual = choose_halo(layer(56, 3, 1, 256), 132);
  require(usual.tile == HaloTileShape::kLarge && usual.shape.copy_bytes == 16,
          "a usual layer wants large, staged tiles");
  require(choose_halo(layer(56, 3, 1, 64), 132).tile == HaloTileShape::kSmall, "few columns want small tiles");
  require(choose_halo(layer(7, 3, 1, 512), 1).tile == HaloTileShape::kSmall, "small images want small tiles");
  const HaloChoice strided = choose_halo(layer(56, 3, 2, 256), 132);
  require(strided.fits && strided.shape.copy_bytes == 0, "a strided halo leaves no room for staging");
  // Few channels leave room: only what exists is staged.
  const HaloChoice stem = choose_halo(layer(224, 7, 2, 64, 3), 132);
  require(stem.fits && stem.shape.copy_bytes == 16 && stem.shape.staged_channels == 8, "a stem can be staged");
  require(!choose_halo(layer(56, 1, 1, 256), 132).fits, "a single tap has no halo");
  require(!choose_halo(layer(56, 9, 1, 256), 132).fits, "nine taps along an axis are too many");
  HaloCase apart = layer(56, 3, 1, 256);
  apart.h.dilation = apart.w.dilation = 30;
  require(!choose_halo(apart, 132).fits, "taps that are far apart do not fit");
  HaloCase channels = layer(56, 3, 1, 128);
  channels.planes = false, channels.copy_bytes = 0;
  require(choose_halo(channels, 132).fits, "two tiles of columns gather NHWC inputs");
  channels.columns = 129;
  require(!choose_halo(channels, 132).fits, "more tiles of columns copy NHWC inputs first");

  const Strides even{8 * 64, 64, 8, 1};
  require(halo_copy_bytes(256, even, 2) == 16 && halo_copy_bytes(256 + 8, even, 2) == 8, "addresses limit copies");
  require(halo_copy_bytes(256, {8 * 98, 98, 14, 1}, 2) == 4, "rows limit copies");
  require(halo_copy_bytes(256, {8 * 49, 49, 7, 1}, 2) == 0, "single elements of 16 bits cannot be copied alone");
  require(halo_copy_bytes(256, {8 * 49, 49, 7, 1}, 4) == 4, "single elements of 32 bits can");
  require(halo_copy_bytes(256, {512, 1, 64, 8}, 2) == 0, "channels side by side are gathered");
}

}  // namespace

Checks halo_checks() {
  return {{"halo_places", halo_places}, {"halo_taps", halo_taps},     {"halo_staging", halo_staging},
          {"halo_banks", halo_banks},   {"halo_limits", halo_limits}, {"halo_choice", halo_choice}};
}

}  // namespace bap_kernels
