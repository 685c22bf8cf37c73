// The weight's gradient by WGMMA, compute capability 9.0a: the GEMM of weight_gradient.cuh, over the same pixels of the
// same tiles, in the loops of warpgroup_pipeline.cuh.
//
// Block: kRows filters x kColumns input channels of one tap and one chunk. Grid: as weight_operands.cuh says.
// Both operands lie as they are read, pixel by pixel, so the depth of the sum, the pixels, is not what lies side by
// side: they are products of transposed operands. A stage holds panels of kPanelChannels channels, a row of 128 bytes
// for each pixel (matrix_descriptor.h).
// Eight threads copy the 128 bytes of a panel that a pixel has; a thread takes kPixels pixels of every panel, and its
// look-ups stay the same for the whole sum.
// Needs:  what weight_gradient.cuh needs.
// Allows: what it allows.
// Accumulates in float32. No atomics: chunks are added in order by sum_partials.cu.
#pragma once

#include "backends/cuda/kernels/warpgroup_pipeline.cuh"
#include "backends/cuda/kernels/weight_operands.cuh"

namespace bap_kernels {

// The warpgroup that copies.
template <typename scalar_t, class Tile>
__device__ __forceinline__ void produce_weights(const WeightGradientParams& p, const WeightPlan& plan) {
  constexpr int kBytes = sizeof(scalar_t), kVector = kChunkBytes / kBytes, kDepth = kDepthBytes / kBytes;
  constexpr int kPixels = kDepth * kDepthChunks / kWarpgroup;
  constexpr int kPanelsA = Tile::kRows / kPanelChannels, kPanelsB = Tile::kColumns / kPanelChannels;
  give_registers<WarpgroupLayout<Tile>::kProducerRegisters>();
  const int thread = threadIdx.x % kWarpgroup, chunk = copy_chunk(thread);
  // The thread's channels: rows and columns of its chunk of each panel.
  const int row = plan.first_row + chunk * kVector, column = plan.first_column + chunk * kVector;
  int channels[kPanelsB];
#pragma unroll
  for (int i = 0; i < kPanelsB; ++i) {
    const int k = column + i * kPanelChannels;
    channels[i] = k < plan.used ? listed_channel(p.source_list, k) : 0;
  }
  int first = plan.first_pixel;
  const auto copy_chunks = [&]<bool kWhole>(std::bool_constant<kWhole>, int to) {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const int pixel = copy_row<kWarpgroup>(thread, i);
      const PixelPlace<scalar_t> at = pixel_place<scalar_t>(p, plan, first + pixel);
      const scalar_t* grad = at.grad + row;
      const int rows_to = to + by_rows(pixel, chunk), columns_to = rows_to + Tile::kColumnsAt;
#pragma unroll
      for (int j = 0; j < kPanelsA; ++j) {
        const int k = row + j * kPanelChannels;
        copy_chunk_unless<kWhole>(!at.there || k >= p.rows, rows_to + j * kPanelBytes, grad + j * kPanelChannels,
                                  kWhole ? kChunkBytes : chunk_bytes<kBytes>(k, p.rows));
      }
#pragma unroll
      for (int j = 0; j < kPanelsB; ++j) {
        const int k = column + j * kPanelChannels;
        copy_chunk_unless<kWhole>(!at.inside || k >= plan.used, columns_to + j * kPanelBytes, at.source + channels[j],
                                  kWhole ? kChunkBytes : chunk_bytes<kBytes>(k, plan.used));
      }
    }
    first += kDepth;
  };
  const bool whole = p.rows % kVector == 0 && plan.used % kVector == 0;
  copy_stages<Tile>(plan.steps, [&](int to, int) {
    if (whole) {
      copy_chunks(std::true_type(), to);
    } else {
      copy_chunks(std::false_type(), to);
    }
  });
}

// A warpgroup that multiplies: number `group`, whose rows are a panel.
template <MathMode kMode, class Tile>
__device__ __forceinline__ void consume_weights(const WeightGradientParams& p, const WeightPlan& plan, int group) {
  static_assert(kWarpgroupRows == kPanelChannels, "a panel for each group");
  take_registers<WarpgroupLayout<Tile>::kConsumerRegisters>();
  Sums<Tile> sums = {};
  multiply_stages<Tile>(sums, plan.steps, [&](int at) {
    const int rows = at + group * kPanelBytes, columns = at + Tile::kColumnsAt;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      multiply_group<kMode, Tile::kColumns, true>(
          sums[0], transposed_descriptor(shared_address(rows + slice * kPanelSliceBytes)),
          transposed_descriptor(shared_address(columns + slice * kPanelSliceBytes)));
    }
  });
  store_chunk_sums<Tile>(p, plan, sums);
}

template <MathMode kMode, class Tile>
__global__ void __launch_bounds__(BAP_KERNELS_WARPGROUP_BOUND(WarpgroupLayout<Tile>::kThreads), 1)
    warpgroup_weight_gradient_kernel(const __grid_constant__ WeightGradientParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using scalar_t = typename MathTraits<kMode>::scalar_t;
  static_assert(sizeof(scalar_t) == 2, "operands of 16 bits alone can be transposed");
  const WeightPlan plan = weight_plan<Tile, sizeof(scalar_t)>(p);
  if (plan.first_column >= plan.used) return;
  begin_stages<Tile, kWarpgroup>();
  const int group = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (group == WarpgroupLayout<Tile>::kConsumerGroups) {
    produce_weights<scalar_t, Tile>(p, plan);
  } else {
    consume_weights<kMode, Tile>(p, plan, group);
  }
#endif
}

}  // namespace bap_kernels
