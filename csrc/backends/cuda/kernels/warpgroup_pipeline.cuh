// The loops of the kernels that multiply by WGMMA, compute capability 9.0a, from stages in shared memory.
//
// One warpgroup copies, the others multiply, kWarpgroupRows rows of the tile each. They meet at two barriers in shared
// memory for each stage: `full`, at which every copying thread arrives when its copies have landed, and `empty`, at
// which every multiplying warp arrives when its products have been made. A product reads both operands from shared
// memory; its group's sums stay in registers, which the copying warpgroup gives up.
//
// Copies of what calls pass are the asynchronous ones of 16 bytes of each thread: padding, strides and lists of blocks
// are decided chunk by chunk. They write as threads do, while products read through another path, so a fence stands
// between the two (fence_async_proxy). What is laid out for the kernel comes in bulk copies, which take that path, too:
// one thread starts them, and `full` waits for their bytes.
#pragma once

#include "backends/cuda/kernels/fragments.cuh"
#include "backends/cuda/kernels/wgmma.cuh"

// Code for other devices has no body and takes no block of this size, by which it is known; see has_warpgroups.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BAP_KERNELS_WARPGROUP_BOUND(threads) 32
#else
#define BAP_KERNELS_WARPGROUP_BOUND(threads) threads
#endif

namespace bap_kernels {

template <class Tile>
struct WarpgroupLayout {
  static constexpr int kConsumers = Tile::kThreads, kConsumerGroups = kConsumers / kWarpgroup;
  static constexpr int kThreads = kConsumers + kWarpgroup;
  // Registers of a thread are given out in units of 8; a block of 384 threads begins with 168 for each.
  static constexpr int kProducerRegisters = 136, kConsumerRegisters = 184;
  static constexpr int kBarriersAt = Tile::kSharedBytes;
  static constexpr int kSharedBytes = kBarriersAt + 2 * Tile::kStages * 8;
  BAP_HOST_DEVICE static constexpr int full_at(int stage) { return kBarriersAt + 16 * stage; }
  BAP_HOST_DEVICE static constexpr int empty_at(int stage) { return kBarriersAt + 16 * stage + 8; }
  static_assert(Tile::kWarpsN == 1 && Tile::kRows == kConsumerGroups * kWarpgroupRows, "a product's rows for each");
  static_assert(Tile::kStageBytes % kGroupBytes == 0 && Tile::kColumnsAt % kGroupBytes == 0, "whole groups of rows");
  static_assert(kBarriersAt % 8 == 0 && Tile::kEpilogueBytes <= kBarriersAt && Tile::kStages > 1, "barriers");
  static_assert(kSharedBytes <= 227 * 1024, "a block's most");
};

// A place in the ring of stages, and how often it has been gone round.
template <int kStages>
struct RingPlace {
  int stage = 0, round = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, ++round;
  }
};

// By all threads, before anything else. `kArrivals`: at each full stage.
template <class Tile, int kArrivals>
__device__ __forceinline__ void begin_stages() {
  using Layout = WarpgroupLayout<Tile>;
  // A swizzle is a matter of addresses, not of places in the block's memory.
  if (shared_address(0) % kGroupBytes != 0) __trap();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      init_barrier(Layout::full_at(stage), kArrivals);
      init_barrier(Layout::empty_at(stage), Layout::kConsumers / kWarp);
    }
    // Bulk copies count at the barriers.
    fence_async_proxy();
  }
  __syncthreads();
}

// Of the warpgroup that copies: `copy(to, full)` starts the thread's copies of the next step into the stage that begins
// at byte `to` and has the barrier `full`.
template <class Tile, class Copy>
__device__ __forceinline__ void copy_stages(int steps, Copy copy) {
  using Layout = WarpgroupLayout<Tile>;
  RingPlace<Tile::kStages> at;
  for (int step = 0; step < steps; ++step, at.advance()) {
    // A new barrier counts as having been passed in the round before the first.
    wait_for_barrier(Layout::empty_at(at.stage), (at.round + 1) & 1);
    copy(at.stage * Tile::kStageBytes, Layout::full_at(at.stage));
    arrive_after_copies(Layout::full_at(at.stage));
  }
  wait_for_all_copies();
}

// Of a warpgroup that multiplies: `multiply(at)` starts the products of the stage that begins at byte `at`.
template <class Tile, class Multiply>
__device__ __forceinline__ void multiply_stages(Sums<Tile>& sums, int steps, Multiply multiply) {
  using Layout = WarpgroupLayout<Tile>;
  // Opaque zeros: a path around the loop that defines the sums anew would make the assembler serialise its products.
  hold_sums(sums[0]);
  RingPlace<Tile::kStages> at;
  int before = 0;
  for (int step = 0; step < steps; ++step, at.advance()) {
    wait_for_barrier(Layout::full_at(at.stage), at.round & 1);
    fence_async_proxy();
    begin_products(sums[0]);
    multiply(at.stage * Tile::kStageBytes);
    commit_products();
    // Those of the step before have been made: its stage may be filled again.
    wait_for_products<1>();
    if (step > 0 && threadIdx.x % kWarp == 0) arrive(Layout::empty_at(before));
    before = at.stage;
  }
  wait_for_products<0>();
  hold_sums(sums[0]);
}

}  // namespace bap_kernels
