// The loop of the kernels that multiply by mma.sync from stages in shared memory.
#pragma once

#include "backends/cuda/kernels/fragments.cuh"

namespace bap_kernels {

// Adds the products of all steps to `sums`. `copy(to)` starts the thread's copies of the next step into the stage that
// begins at byte `to`; it runs Tile::kStages - 1 steps ahead of the products. Operands lie by rows or by depth. At the
// end nothing of the thread is on its way; its block may still be reading.
template <MathMode kMode, class Tile, bool kRowsByDepth, bool kColumnsByDepth, class Copy>
__device__ __forceinline__ void multiply_steps(Sums<Tile>& sums, int steps, Copy copy) {
  constexpr int kBytes = sizeof(typename MathTraits<kMode>::scalar_t), kStages = Tile::kStages;
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) copy(stage * Tile::kStageBytes);
    commit_copies();
  }
  int read = 0, written = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    // The copies of all threads are there, and what was read in the step before may be overwritten.
    __syncthreads();
    if (step + kStages - 1 < steps) copy(written * Tile::kStageBytes);
    commit_copies();
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      FragmentsA<Tile> a;
      FragmentsB<Tile> b;
      load_a<Tile, kBytes, kRowsByDepth>(a, read * Tile::kStageBytes, slice);
      load_b<Tile, kBytes, kColumnsByDepth>(b, read * Tile::kStageBytes + Tile::kColumnsAt, slice);
      multiply<kMode, Tile>(sums, a, b);
    }
    read = read + 1 == kStages ? 0 : read + 1;
    written = written + 1 == kStages ? 0 : written + 1;
  }
  wait_for_copies<0>();
}

}  // namespace bap_kernels
