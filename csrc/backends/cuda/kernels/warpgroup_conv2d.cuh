// The gathered convolution by WGMMA, compute capability 9.0a: the implicit GEMM of gathered_conv2d.cuh, with its tiles,
// its copies of rows and its epilogue, in the loops of warpgroup_pipeline.cuh. Weights come in bulk copies of whole
// tiles (weight_tiles.h).
//
// Block: a tile of the result, or of one part of its sums. Grid: as gathered_conv2d.cuh. Shared memory: kStages of both
//   operands, then the result in float32 and offsets in the same place; the barriers.
// Needs:  what gathered_conv2d.cuh needs, with weights in tiles that are zero beyond the depth; a result: terms of a
//   switch's gradient are left to the other kernel.
// Allows: what it allows.
// Accumulates in float32. No atomics: the result does not vary between runs.
#pragma once

#include "backends/cuda/kernels/nhwc_operands.cuh"
#include "backends/cuda/kernels/warpgroup_pipeline.cuh"
#include "backends/cuda/kernels/weight_tiles.h"

namespace bap_kernels {

// Weights that no thread copies chunk by chunk.
struct TiledFilters {
  static constexpr int kBlock = kWeightTileElements;
  __device__ __forceinline__ void begin(const BatchRun&, int, int, int) {}
  template <bool kWhole>
  __device__ __forceinline__ void copy(int, int64_t, int, int) const {}
};

// Starts the copies of a step's weights, of one thread: of the tiles `stride` elements apart from `from` on, into the
// columns that begin at byte `to`.
template <typename scalar_t, class Tile>
__device__ __forceinline__ void copy_weights(int to, const scalar_t* from, int64_t stride, int full) {
  static_assert(Tile::kColumns % kWeightTileColumns == 0, "whole tiles of weights");
  constexpr int kTiles = Tile::kColumns / kWeightTileColumns;
  arrive_expecting<kTiles * kWeightTileBytes>(full);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) copy_bulk<kWeightTileBytes>(to + i * kWeightTileBytes, from + i * stride, full);
}

// The warpgroup that copies.
template <typename scalar_t, class Tile>
__device__ __forceinline__ void produce(const ConvParams& p, const NhwcPlan& plan) {
  give_registers<WarpgroupLayout<Tile>::kProducerRegisters>();
  const int thread = threadIdx.x % kWarpgroup;
  NhwcOperands<scalar_t, Tile, kWarpgroup, TiledFilters> operands;
  operands.begin(p, plan, thread);
  const BatchRun& run = p.runs.of[plan.run];
  const scalar_t* weights =
      static_cast<const scalar_t*>(run.weight) + plan.first_column / kWeightTileColumns * run.stride_weight_column;
  copy_stages<Tile>(plan.steps, [&](int to, int full) {
    if (thread == 0) {
      copy_weights<scalar_t, Tile>(to + Tile::kColumnsAt, weights + operands.step.filter, run.stride_weight_column,
                                   full);
    }
    operands.copy(p, plan, to, thread);
  });
}

// A warpgroup that multiplies: number `group`.
template <MathMode kMode, class Tile>
__device__ __forceinline__ void consume(const ConvParams& p, const NhwcPlan& plan, int group) {
  using Layout = WarpgroupLayout<Tile>;
  using scalar_t = typename MathTraits<kMode>::scalar_t;
  take_registers<Layout::kConsumerRegisters>();
  Sums<Tile> sums = {};
  multiply_stages<Tile>(sums, plan.steps, [&](int at) {
    const int rows = at + group * kWarpgroupRows * kDepthBytes, columns = at + Tile::kColumnsAt;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      multiply_group<kMode, Tile::kColumns>(sums[0], matrix_descriptor(shared_address(rows + slice * kSliceBytes)),
                                            matrix_descriptor(shared_address(columns + slice * kSliceBytes)));
    }
  });
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

template <MathMode kMode, class Tile, bool kGradient>
__global__ void __launch_bounds__(BAP_KERNELS_WARPGROUP_BOUND(WarpgroupLayout<Tile>::kThreads), 1)
    warpgroup_conv2d_kernel(const __grid_constant__ ConvParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using scalar_t = typename MathTraits<kMode>::scalar_t;
  const NhwcPlan plan = nhwc_plan<Tile, sizeof(scalar_t), kGradient>(p, p.parts.count);
  if (plan.first_column >= stored_columns(p)) return;
  // The thread that starts bulk copies arrives for them, too.
  begin_stages<Tile, kWarpgroup + 1>();
  const int group = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (group == WarpgroupLayout<Tile>::kConsumerGroups) {
    produce<scalar_t, Tile>(p, plan);
  } else {
    consume<kMode, Tile>(p, plan, group);
  }
#endif
}

}  // namespace bap_kernels
