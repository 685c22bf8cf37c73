// Blocks of tiles, and the pixels that they read.
#include "backends/cpu/winograd_tiles.h"

#include <algorithm>

#include "backends/cpu/isa.h"
#include "backends/cpu/microkernels/planes.h"
#include "backends/cpu/native_call.h"
#include "backends/cpu/pixel_source.h"
#include "backends/cpu/scratch.h"

namespace bap_kernels {
namespace {

// A block may exceed the limit by a quarter rather than be cut.
constexpr double kOvershoot = 1.25;

// Pixels of a block inside the image: rows [row, row + rows) and columns.
struct Inside {
  int64_t row, rows, column, columns;

  Inside(const TileSource& s, const TileBlock& b) {
    const auto range = [&](int64_t first, int64_t count, int64_t pad, int64_t limit) {
      const int64_t begin = std::clamp<int64_t>(first * s.step - pad, 0, limit);
      const int64_t end = std::clamp<int64_t>((first + count - 1) * s.step + s.edge - pad, begin, limit);
      return std::pair(begin, end - begin);
    };
    std::tie(row, rows) = range(b.first_row, b.rows, s.pad_top, s.height);
    std::tie(column, columns) = range(b.first_column, b.columns, s.pad_left, s.width);
  }
};

const float* pixel_of(const TileSource& s, int64_t image, int64_t row, int64_t column) {
  return s.data + (s.images ? s.images[image] : image) * s.stride_n + row * s.stride_h + column * s.stride_w;
}

// A list in order has at most as many moves as it and the channels have vectors.
std::vector<micro::GatherMove> find_moves(const int32_t* list, int64_t count, int64_t lanes) {
  std::vector<micro::GatherMove> moves;
  for (int64_t first = 0; first < count; first += lanes) {
    const size_t own = moves.size();
    for (int64_t lane = 0; lane < std::min(lanes, count - first); ++lane) {
      const auto chunk = static_cast<int32_t>(list[first + lane] / lanes);
      auto move = std::find_if(moves.begin() + own, moves.end(), [&](const auto& m) { return m.chunk == chunk; });
      if (move == moves.end()) move = moves.insert(move, {chunk, 0, 0, false});
      move->from |= static_cast<uint16_t>(1u << list[first + lane] % lanes);
      move->to |= static_cast<uint16_t>(1u << lane);
    }
    moves.back().last = true;
  }
  return moves;
}

// The pixels that the block reads, [image][row][column][channel].
float* copy_pixels(const TileSource& s, const TileBlock& b, const Inside& in) {
  const micro::WinogradTable& table = *isa_winograd();
  const int64_t area = in.rows * in.columns, count = b.images * area;
  float* pixels = thread_scratch(Scratch::kWinogradPixels, count * s.channels + table.lanes);
  const bool planes = s.stride_w == 1 && s.stride_c != 1;
  const bool joined = s.stride_h == s.width * s.stride_w && in.columns == s.width;
  const int64_t runs = joined ? 1 : in.rows, length = joined ? area : in.columns;
  std::vector<const float*> channels(planes ? s.count : 0);
  float* out = pixels;
  for (int64_t image = b.first_image; image < b.first_image + b.images; ++image) {
    for (int64_t run = 0; run < runs; ++run, out += length * s.channels) {
      const float* source = pixel_of(s, image, in.row + run, in.column);
      if (planes) {
        for (int64_t i = 0; i < s.count; ++i) channels[i] = source + s.channel(i) * s.stride_c;
        micro::planes_to_pixels(channels.data(), s.count, length, out, s.channels);
      } else if (s.gather) {
        s.gather.run({length, source, s.stride_w, out, s.channels, s.all_channels, s.count, s.gather_steps.data(),
                      false, nullptr, nullptr, false});
      } else if (s.stride_c == 1 && s.list) {
        table.gather({length, s.count, source, s.stride_w, s.list, s.moves.data(), static_cast<int64_t>(s.moves.size()),
                      out, s.channels});
      } else {
        for (int64_t p = 0; p < length; ++p) {
          const float* pixel = source + p * s.stride_w;
          for (int64_t i = 0; i < s.count; ++i) out[p * s.channels + i] = pixel[s.channel(i) * s.stride_c];
        }
      }
    }
  }
  return pixels;
}

}  // namespace

std::vector<TileBlock> cut_tiles(int64_t batch, int64_t tile_rows, int64_t tile_columns, int64_t most, int64_t shared) {
  const int64_t per_image = tile_rows * tile_columns;
  std::vector<TileBlock> blocks;
  if (static_cast<double>(per_image) <= kOvershoot * static_cast<double>(most) && batch >= shared) {
    int64_t count = ceil_div(batch, std::max<int64_t>(1, most / per_image));
    count = std::min(batch, round_up(count, shared));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = i * batch / count, end = (i + 1) * batch / count;
      blocks.push_back({first, end - first, 0, tile_rows, 0, tile_columns});
    }
    return blocks;
  }
  int64_t column_parts = ceil_div(tile_columns, most);
  const int64_t rows = std::max<int64_t>(1, most / ceil_div(tile_columns, column_parts));
  int64_t row_parts = ceil_div(tile_rows, rows);
  while (row_parts < tile_rows && batch * row_parts * column_parts % shared != 0) ++row_parts;
  // For many threads rows of tiles may be too few.
  while (shared > 2 && batch * row_parts * column_parts < shared && column_parts < tile_columns) ++column_parts;
  for (int64_t image = 0; image < batch; ++image) {
    for (int64_t r = 0; r < row_parts; ++r) {
      const int64_t first_row = r * tile_rows / row_parts, end_row = (r + 1) * tile_rows / row_parts;
      for (int64_t c = 0; c < column_parts; ++c) {
        const int64_t first = c * tile_columns / column_parts, end = (c + 1) * tile_columns / column_parts;
        blocks.push_back({image, 1, first_row, end_row - first_row, first, end - first});
      }
    }
  }
  return blocks;
}

void TileSource::plan(bool copied) {
  const micro::WinogradTable& table = *isa_winograd();
  channels = round_up(count, std::max<int64_t>(table.lanes, micro::kPlaneChannels));
  in_place = !list && !copied && stride_c == 1 && channels == count;
  if (!list || stride_c != 1) return;
  if (table.gather_moves) {
    moves = find_moves(list, count, table.lanes);
  } else if (all_channels > 0) {
    const ChannelGatherKernel by_vectors = isa_gather(/*pairs=*/false);
    gather_steps =
        plan_gather([this](int64_t i) { return channel(i); }, count, all_channels, by_vectors, sizeof(float));
    if (!gather_steps.empty()) gather = by_vectors;
  }
}

std::vector<const float*> tile_points(const TileSource& s, const TileBlock& b,
                                      const std::function<void(float*, int64_t)>& change) {
  const Inside in(s, b);
  float* pixels = s.in_place ? nullptr : copy_pixels(s, b, in);
  if (pixels && change) change(pixels, b.images * in.rows * in.columns);
  const float* none = thread_zeros(s.channels);
  std::vector<const float*> table(b.tiles() * s.edge * s.edge);
  const float** point = table.data();
  for (int64_t image = 0; image < b.images; ++image) {
    for (int64_t tile_row = 0; tile_row < b.rows; ++tile_row) {
      for (int64_t tile_column = 0; tile_column < b.columns; ++tile_column) {
        const int64_t top = (b.first_row + tile_row) * s.step - s.pad_top;
        const int64_t left = (b.first_column + tile_column) * s.step - s.pad_left;
        for (int64_t row = top; row < top + s.edge; ++row) {
          const bool inside = row >= 0 && row < s.height;
          const float* first = nullptr;
          int64_t step = s.channels;
          if (inside && s.in_place) {
            first = pixel_of(s, b.first_image + image, row, 0);
            step = s.stride_w;
          } else if (inside) {
            first = pixels + ((image * in.rows + row - in.row) * in.columns - in.column) * s.channels;
          }
          for (int64_t column = left; column < left + s.edge; ++column) {
            *point++ = inside && column >= 0 && column < s.width ? first + column * step : none;
          }
        }
      }
    }
  }
  return table;
}

int64_t point_step_of(int64_t channels, int64_t tiles) {
  // An odd number of lines from point to point: a power of two would leave them few sets of the L1 cache.
  const int64_t step = round_up(channels * tiles, 16);
  return step / 16 % 2 == 0 ? step + 16 : step;
}

}  // namespace bap_kernels
