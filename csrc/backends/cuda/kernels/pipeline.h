// The sum of every kernel that multiplies: stages of shared memory are filled by asynchronous copies that run ahead of
// the products made from them.
//
// A kernel gives: Tile, kMode, kStages, kStageBytes, a State with `sums`, and
//   begin(b, p, plan, thread, state)                 before its first copy; copies that it starts arrive with the first
//                                                    step's
//   copy(b, p, plan, thread, state, stage)           starts the copies of the next step into the stage at byte `stage`
//   load(b, plan, thread, state, step, stage, slice) loads the fragments of a slice of that step
//   prepare(b, p, plan, step)                        what the block does before the products of a step, with a barrier
//                                                    behind what it writes; copies that it starts arrive kStages - 1
//                                                    steps later
// The plan gives `steps`. After it every copy has arrived, for its own thread.
#pragma once

#include "backends/cuda/kernels/block_parts.h"

namespace bap_kernels {

template <class Tile, class State>
BAP_DEVICE void clear_sums(State& s) {
  BAP_UNROLL
  for (int i = 0; i < Tile::kMmasM; ++i) {
    BAP_UNROLL
    for (int j = 0; j < Tile::kMmasN; ++j) {
      BAP_UNROLL
      for (int r = 0; r < 4; ++r) s.sums[i][j][r] = 0.0f;
    }
  }
}

template <class Kernel, class Block, class Params, class Plan>
BAP_DEVICE void sum_products(Block& b, const Params& p, const Plan& plan) {
  using State = typename Kernel::State;
  constexpr int kStages = Kernel::kStages, kStageBytes = Kernel::kStageBytes;
  b.each([&](int thread, State& s) {
    Kernel::begin(b, p, plan, thread, s);
    clear_sums<typename Kernel::Tile>(s);
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (stage < plan.steps) Kernel::copy(b, p, plan, thread, s, stage * kStageBytes);
      b.commit(thread);
    }
  });
  int read = 0, written = kStages - 1;
  for (int step = 0; step < plan.steps; ++step) {
    b.each([&](int thread, State&) { b.template wait<kStages - 2>(thread); });
    // What was read in the step before may be overwritten after it, too.
    b.sync();
    Kernel::prepare(b, p, plan, step);
    b.each([&](int thread, State& s) {
      if (step + kStages - 1 < plan.steps) Kernel::copy(b, p, plan, thread, s, written * kStageBytes);
      b.commit(thread);
    });
    BAP_UNROLL
    for (int slice = 0; slice < kSlices; ++slice) {
      b.each([&](int thread, State& s) { Kernel::load(b, plan, thread, s, step, read * kStageBytes, slice); });
      b.template multiply<Kernel::kMode, typename Kernel::Tile>();
    }
    read = read + 1 == kStages ? 0 : read + 1;
    written = written + 1 == kStages ? 0 : written + 1;
  }
  b.each([&](int thread, State&) { b.template wait<0>(thread); });
}

}  // namespace bap_kernels
