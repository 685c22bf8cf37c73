// See tasks.h.
#include "backends/cpu/tasks.h"

#include <algorithm>

namespace bap_kernels {
namespace {

thread_local TaskRecord* record = nullptr;

// A grid is left for another one only where that ends so much sooner.
constexpr double kWorthwhile = 0.95;

int64_t share(int64_t count, int64_t parts) { return (count + parts - 1) / parts; }

}  // namespace

TaskRecord::TaskRecord() {
  TORCH_CHECK(record == nullptr, "TaskRecord: expected one at a time in a thread.");
  record = this;
}
TaskRecord::~TaskRecord() { record = nullptr; }
TaskRecord* TaskRecord::current() { return record; }

double grid_cycles(const GridShape& s, const TaskGrid& grid) {
  const int64_t pixels = std::min(s.pixels, share(s.tiles, grid.pixel_blocks) * s.tile_pixels);
  const int64_t filters = std::min(s.filters, share(s.panels, grid.channel_groups) * s.panel_filters);
  const int64_t rounds = share(grid.tasks(), s.threads);
  return static_cast<double>(rounds) * direct_cycles(pixels, filters, s.steps);
}

TaskGrid spread_grid(const GridShape& s, const TaskGrid& grid) {
  if (s.threads <= 2) return grid;
  const int64_t blocks = std::max<int64_t>(1, (s.tiles + s.tiles_per_block / 2) / s.tiles_per_block);
  TaskGrid best = grid;
  double least = kWorthwhile * grid_cycles(s, grid);
  for (int64_t groups = 1; groups <= std::min<int64_t>(s.panels, s.threads); ++groups) {
    const int64_t rounds = share(blocks * groups, s.threads);
    const TaskGrid other{std::min(s.tiles, share(rounds * s.threads, groups)), groups};
    const double cycles = grid_cycles(s, other);
    if (cycles < least) best = other, least = cycles;
  }
  return best;
}

}  // namespace bap_kernels
