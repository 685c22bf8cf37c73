// The gathered convolution by WGMMA, compute capability 9.0a: the implicit GEMM of gathered_conv2d.cuh, with its tiles,
// its copies and its epilogue.
//
// Block: a tile of the result, or of one part of its sums. One warpgroup copies, the others multiply, kWarpgroupRows
// rows of the tile each. They meet at two barriers in
//   shared memory for each stage: `full`, at which every copying thread arrives when its copies have landed, and
//   `empty`, at which every multiplying warp arrives when its products have been made. A product reads both operands
//   from shared memory; its group's sums stay in registers, which the copying warpgroup gives up.
// Grid: as gathered_conv2d.cuh. Shared memory: kStages of both operands, then the result in float32 and offsets in
//   the same place; the barriers.
// Needs:  what gathered_conv2d.cuh needs; a result: terms of a switch's gradient are left to the other kernel.
// Allows: what it allows.
// Accumulates in float32. No atomics: the result does not vary between runs.
//
// Copies are the asynchronous ones of 16 bytes of each thread, not those of the tensor memory accelerator: padding,
// strides and lists of blocks are decided chunk by chunk. They write as threads do, while products read through another
// path, so a fence stands between the two (fence_copies).
#pragma once

#include "backends/cuda/kernels/nhwc_operands.cuh"
#include "backends/cuda/kernels/wgmma.cuh"

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

// The warpgroup that copies.
template <typename scalar_t, class Tile>
__device__ __forceinline__ void produce(const ConvParams& p, const NhwcPlan& plan) {
  using Layout = WarpgroupLayout<Tile>;
  give_registers<Layout::kProducerRegisters>();
  const int thread = threadIdx.x % kWarpgroup;
  NhwcOperands<scalar_t, Tile, kWarpgroup> operands;
  operands.begin(p, plan, thread);
  RingPlace<Tile::kStages> at;
  for (int step = 0; step < plan.steps; ++step, at.advance()) {
    // A new barrier counts as having been passed in the round before the first.
    wait_for_barrier(Layout::empty_at(at.stage), (at.round + 1) & 1);
    operands.copy(p, plan, at.stage * Tile::kStageBytes, thread);
    arrive_after_copies(Layout::full_at(at.stage));
  }
  wait_for_all_copies();
}

// A warpgroup that multiplies: number `group`.
template <MathMode kMode, class Tile>
__device__ __forceinline__ void consume(const ConvParams& p, const NhwcPlan& plan, int group) {
  using Layout = WarpgroupLayout<Tile>;
  using scalar_t = typename MathTraits<kMode>::scalar_t;
  take_registers<Layout::kConsumerRegisters>();
  Sums<Tile> sums = {};
  // Opaque zeros: a path around the loop that defines the sums anew would make the assembler serialise its products.
  hold_sums(sums[0]);
  RingPlace<Tile::kStages> at;
  int before = 0;
  for (int step = 0; step < plan.steps; ++step, at.advance()) {
    wait_for_barrier(Layout::full_at(at.stage), at.round & 1);
    fence_copies();
    begin_products(sums[0]);
    const int rows = at.stage * Tile::kStageBytes + group * kWarpgroupRows * kDepthBytes;
    const int columns = at.stage * Tile::kStageBytes + Tile::kColumnsAt;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      multiply_group<kMode, Tile::kColumns>(sums[0], rows + slice * kSliceBytes, columns + slice * kSliceBytes);
    }
    commit_products();
    // Those of the step before have been made: its stage may be filled again.
    wait_for_products<1>();
    if (step > 0 && threadIdx.x % kWarp == 0) arrive(Layout::empty_at(before));
    before = at.stage;
  }
  wait_for_products<0>();
  hold_sums(sums[0]);
  if (p.parts.sums != nullptr) {
    return store_sums<Tile>(sums, partial_sums(p, plan, plan.part), p.parts.stride_row, plan.rows - plan.first_row,
                            p.columns - plan.first_column);
  }
  // The sums are staged where other warpgroups may still read.
  sync_threads<Layout::kConsumers>();
  Epilogue<scalar_t, Tile, false>::stage_sums(sums);
  prepare_store<scalar_t, Tile>(p, plan, [] { sync_threads<Layout::kConsumers>(); });
  Epilogue<scalar_t, Tile, false>::store(p, plan.first_column);
}

// Code for other devices has no body and takes no block of this size, by which it is known; see has_warpgroups.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BAP_KERNELS_WARPGROUP_BOUND(threads) 32
#else
#define BAP_KERNELS_WARPGROUP_BOUND(threads) threads
#endif

template <MathMode kMode, class Tile, bool kGradient>
__global__ void __launch_bounds__(BAP_KERNELS_WARPGROUP_BOUND(WarpgroupLayout<Tile>::kThreads), 1)
    warpgroup_conv2d_kernel(const __grid_constant__ ConvParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Layout = WarpgroupLayout<Tile>;
  using scalar_t = typename MathTraits<kMode>::scalar_t;
  // A swizzle is a matter of addresses, not of places in the block's memory.
  if (shared_address(0) % kGroupBytes != 0) __trap();
  const NhwcPlan plan = nhwc_plan<Tile, sizeof(scalar_t), kGradient>(p, p.parts.count);
  if (plan.first_column >= stored_columns(p)) return;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      init_barrier(Layout::full_at(stage), kWarpgroup);
      init_barrier(Layout::empty_at(stage), Layout::kConsumers / kWarp);
    }
  }
  __syncthreads();
  const int group = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (group == Layout::kConsumerGroups) {
    produce<scalar_t, Tile>(p, plan);
  } else {
    consume<kMode, Tile>(p, plan, group);
  }
#endif
}

}  // namespace bap_kernels
