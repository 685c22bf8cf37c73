// Parallel regions of the native kernels: tasks that may run in any order, at once or not.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>
#include <vector>

namespace bap_kernels {

// The tasks of one region: their estimated cycles, in order, and how many neighbours a thread takes at least.
struct TaskRegion {
  int64_t grain;
  std::vector<double> cycles;
};

// For tests and simulations: while it lives, kernels called by its thread note their regions, in order, and leave
// results as they are.
class TaskRecord {
 public:
  TaskRecord();
  ~TaskRecord();
  TaskRecord(const TaskRecord&) = delete;
  TaskRecord& operator=(const TaskRecord&) = delete;
  // That of the calling thread; null where there is none.
  static TaskRecord* current();

  std::vector<TaskRegion> regions;
};

// Threads for a region that begins now; one inside of another region.
inline int free_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// The same for so many multiply-adds: fewer than some cost less than waking a second thread.
inline int threads_for(int64_t products) {
  constexpr int64_t kFewestProducts = 200'000;
  return products < kFewestProducts ? 1 : free_threads();
}

// Runs tasks on all threads, each a run of neighbours: run(first, last). `cycles(task)` estimates one.
template <class Cycles, class Run>
void parallel_tasks(int64_t count, int64_t grain, const Cycles& cycles, const Run& run) {
  TaskRecord* record = TaskRecord::current();
  if (record == nullptr) {
    at::parallel_for(0, count, grain, run);
    return;
  }
  TaskRegion region{grain, {}};
  for (int64_t task = 0; task < count; ++task) region.cycles.push_back(cycles(task));
  record->regions.push_back(std::move(region));
}

// Work of the calling thread alone, between regions.
template <class Cycles, class Run>
void serial_task(const Cycles& cycles, const Run& run) {
  TaskRecord* record = TaskRecord::current();
  if (record == nullptr) {
    run();
  } else {
    record->regions.push_back({1, {cycles()}});
  }
}

// Cycles of a block of a direct convolution: products, pixels packed or found, weights read. Rough, from profiles with
// AVX2.
inline double direct_cycles(int64_t pixels, int64_t filters, int64_t steps) {
  constexpr double kPerProduct = 1. / 16, kPerPixel = 0.6, kPerWeight = 0.25;
  const auto p = static_cast<double>(pixels), f = static_cast<double>(filters);
  return static_cast<double>(steps) * (kPerProduct * p * f + kPerPixel * p + kPerWeight * f);
}

// Cycles of numbers that are moved or transformed: about four to a cycle.
inline double pass_cycles(int64_t numbers) { return static_cast<double>(numbers) / 4; }

// How a task grid covers tiles of pixels and panels of channels. The grid never changes the order of a sum.
struct TaskGrid {
  int64_t pixel_blocks, channel_groups;
  int64_t tasks() const { return pixel_blocks * channel_groups; }
};

// What a grid is for.
struct GridShape {
  int64_t tiles, panels, tiles_per_block;  // pixels in tiles, and as many of them as a block should have
  int64_t tile_pixels, panel_filters, pixels, filters, steps;
  int threads;
};

// Cycles until the last thread is done.
double grid_cycles(const GridShape& shape, const TaskGrid& grid);

// The grid, or for more threads than two one of both axes where the grid leaves many of them idle.
TaskGrid spread_grid(const GridShape& shape, const TaskGrid& grid);

}  // namespace bap_kernels
