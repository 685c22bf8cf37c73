// The gathered convolution by WGMMA, compute capability 9.0a: the implicit GEMM of
// gathered_conv2d_block.h for sources in NHWC, with its plan, its copies and its epilogue.
//
// Block: one warpgroup copies, the others multiply, kWarpgroupRows rows of the tile each. They meet at two barriers in
//   shared memory for each stage: `full`, at which every copying thread arrives when its copies have, and `empty`, at
//   which every multiplying warp arrives when its products have been made. A product reads both operands from shared
//   memory; its group's sums stay in registers, which the copying warpgroup gives up.
// Grid: as gathered_conv2d_block.h. Shared memory: kStages of both operands, then the result in float32 and offsets in
//   the same place; the barriers.
// Needs:  what gathered_conv2d_block.h needs without planes; stages at multiples of kGroupBytes; results that are
//   wanted: terms of a switch's gradient are left to the other kernel.
// Allows: what it allows.
// Accumulates in float32. No atomics: the result does not vary between runs.
//
// Copies are the asynchronous ones of 16 bytes of each thread, not those of the tensor memory accelerator: padding,
// strides and lists of blocks are decided chunk by chunk, as in the other kernel, by the same text. They write as
// threads do, while products read through another path, so a fence stands between the two (see_copies).
#pragma once

#include "backends/cuda/kernels/gathered_conv2d_block.h"
#include "backends/cuda/kernels/matrix_descriptor.h"

namespace bap_kernels {

template <MathMode kMode_, class Tile_>
struct WarpgroupConv2d {
  using Tile = Tile_;
  using scalar_t = typename MathTraits<kMode_>::scalar_t;
  static constexpr MathMode kMode = kMode_;
  static constexpr int kStages = Tile::kStages, kStageBytes = Tile::kStageBytes;
  static constexpr int kConsumers = Tile::kThreads, kConsumerGroups = kConsumers / kWarpgroup;
  static constexpr int kThreads = kConsumers + kWarpgroup;
  // Registers of a thread are given out in units of 8; a block of 384 threads begins with 168 for each.
  static constexpr int kProducerRegisters = 136, kConsumerRegisters = 184;
  // The same tile as the copying warpgroup sees it.
  using Copies = GatheredConv2d<kMode, bap_kernels::Tile<Tile::kRows, Tile::kColumns, 4, 1, kStages, 1>, false>;
  using Epilogue = ConvEpilogue<scalar_t, Tile, false>;
  static constexpr int kBarriersAt = Tile::kSharedBytes;
  static constexpr int kSharedBytes = kBarriersAt + 2 * kStages * 8;
  static_assert(sizeof(scalar_t) == 2, "the depth of a product is 16 elements");
  static_assert(Copies::kThreads == kWarpgroup && Tile::kWarpsN == 1, "warps along rows");
  static_assert(Tile::kRows == kConsumerGroups * kWarpgroupRows, "a product's rows for each warpgroup");
  static_assert(kStageBytes % kGroupBytes == 0 && Tile::kColumnsAt % kGroupBytes == 0, "whole groups of rows");
  static_assert(kBarriersAt % 8 == 0 && kStages > 1, "barriers");

  struct State {
    typename Copies::State copies;
    float sums[Tile::kMmasM][Tile::kMmasN][4];
  };
  using Plan = typename Copies::Plan;

  BAP_HOST_DEVICE static int grid_x(const ConvParams& p) { return Copies::grid_x(p); }
  BAP_HOST_DEVICE static int grid_y(const ConvParams& p) { return Copies::grid_y(p); }
  BAP_HOST_DEVICE static constexpr int full_at(int stage) { return kBarriersAt + 16 * stage; }
  BAP_HOST_DEVICE static constexpr int empty_at(int stage) { return kBarriersAt + 16 * stage + 8; }

  // A place in the ring of stages, and how often it has been gone round.
  struct Place {
    int stage = 0, round = 0;
    BAP_DEVICE void advance() {
      if (++stage == kStages) stage = 0, ++round;
    }
  };

  template <class Block>
  BAP_DEVICE static void produce(Block& b, const ConvParams& p, const Plan& plan) {
    b.template give_registers<kProducerRegisters>();
    b.each_of_group([&](int thread, State& s) { Copies::begin(b, p, plan, thread % kWarpgroup, s.copies); });
    Place at;
    for (int step = 0; step < plan.steps; ++step, at.advance()) {
      // A new barrier counts as having been passed in the round before the first.
      b.wait_barrier(empty_at(at.stage), (at.round + 1) & 1);
      b.each_of_group([&](int thread, State& s) {
        Copies::copy(b, p, plan, thread % kWarpgroup, s.copies, at.stage * kStageBytes);
        b.arrive_copies(thread, full_at(at.stage));
      });
    }
    b.finish_copies();
  }

  template <class Block>
  BAP_DEVICE static void consume(Block& b, const ConvParams& p, const Plan& plan, int group) {
    b.template take_registers<kConsumerRegisters>();
    b.each_of_group([&](int, State& s) { clear_sums<Tile>(s); });
    Place at;
    int before = 0;
    for (int step = 0; step < plan.steps; ++step, at.advance()) {
      b.wait_barrier(full_at(at.stage), at.round & 1);
      b.see_copies();
      b.begin_products();
      const int rows = at.stage * kStageBytes + group * kWarpgroupRows * kDepthBytes;
      const int columns = at.stage * kStageBytes + Tile::kColumnsAt;
      BAP_UNROLL
      for (int slice = 0; slice < kSlices; ++slice) {
        b.template multiply_group<kMode, Tile::kColumns>(rows + slice * kSliceBytes, columns + slice * kSliceBytes);
      }
      b.commit_products();
      // Those of the step before have been made: its stage may be filled again.
      b.template wait_products<1>();
      if (step > 0) b.arrive(empty_at(before));
      before = at.stage;
    }
    b.template wait_products<0>();
    // The sums are staged where other warpgroups may still read.
    b.template sync_groups<kConsumers>();
    b.each_of_group([&](int thread, State& s) {
      Epilogue::stage_sums(b, thread, s);
      Copies::write_table(b, p, plan, thread);
      if (p.copy != nullptr) Epilogue::clear_places(b, thread);
    });
    b.template sync_groups<kConsumers>();
    if (p.copy != nullptr) {
      b.each_of_group([&](int thread, State&) { Epilogue::find_places(b, p, plan.first_column, thread); });
      b.template sync_groups<kConsumers>();
    }
    b.each_of_group([&](int thread, State&) { Epilogue::store(b, p, plan.first_column, thread); });
  }

  template <class Block>
  BAP_DEVICE static void run(Block& b, const ConvParams& p) {
    const Plan plan = Copies::make_plan(p, b.block_x(), b.block_y());
    if (plan.first_column >= Epilogue::stored_columns(p)) return;
    b.each([&](int thread, State&) {
      if (thread != 0) return;
      for (int stage = 0; stage < kStages; ++stage) {
        b.init_barrier(full_at(stage), kWarpgroup);
        b.init_barrier(empty_at(stage), kConsumers / kWarp);
      }
    });
    b.sync();
    b.groups([&](int group) {
      if (group == kConsumerGroups) {
        produce(b, p, plan);
      } else {
        consume(b, p, plan, group);
      }
    });
  }
};

}  // namespace bap_kernels
