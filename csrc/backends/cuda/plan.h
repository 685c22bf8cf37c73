// What a convolution on the CUDA kernels runs, decided before anything is allocated, packed or launched: the launches
// follow the plan, so the families that are asked for beforehand are those that run.
//
// Routes of the forward and of the input's gradient:
//   planes  1x1 convolutions of planes whose runs of 16 bytes are aligned: any list
//   rows    NHWC with aligned runs of 16 bytes, without a list or with one of aligned blocks of 8, 16 or 32 channels
//   halo    forwards of several taps whose halo fits into shared memory: any list, any strides (choose_halo)
//   rows after packing   everything else: the listed channels are first copied into a compact NHWC tensor
// Results of planes are computed by rows in a compact NHWC tensor and spread from there: the kernel's own stores would
// be single elements, a plane apart.
#pragma once

#include "backends/cuda/launches.h"
#include "dispatch/verdicts.h"

namespace bap_kernels {

// Whether the pixels and whether the channels of a result lie side by side.
struct ResultLayout {
  bool planes, rows;
};
ResultLayout layout_of(const at::Tensor& result);
// Of at::empty_like(t).
ResultLayout layout_of_like(const at::Tensor& t);
// Of a new tensor of some channels and pixels.
ResultLayout layout_of_new(at::MemoryFormat format, int64_t channels, int64_t pixels);

struct ConvPlan {
  ConvRoute route = ConvRoute::kRows;
  bool packs = false;    // the listed channels are copied first
  bool spreads = false;  // the result is spread from a compact tensor
  FamilySet families = 0;
};

// `launch` has its source as it lies, its runs' lists and images, axes, columns, and what is set besides weights and
// vectors. Without a result there is no layout. `aligned`: the source will be a copy that rows can be read from.
ConvPlan plan_conv(const ConvLaunch& launch, const std::optional<ResultLayout>& result, bool prologue,
                   bool aligned = false);

// The kernel of one launch of the implicit GEMM by rows or planes, its tile, and into how many parts its sums are cut.
struct GemmChoice {
  TileShape tile;
  bool warpgroups;
  WarpgroupTileShape warpgroup_tile;
  int64_t rows, grids;
  int parts;
};
GemmChoice choose_gemm(const ConvLaunch& launch, int64_t images);

// What the weight's gradient copies first.
struct WeightGradientPlan {
  bool packs_grad = false, packs_input = false;
  FamilySet families = 0;
};
// `rows`: how many filters the gradient is computed for; `columns`: the list of its channels.
WeightGradientPlan plan_weight_gradient(const at::Tensor& grad, const at::Tensor& input, int64_t rows,
                                        const ListForm& columns);

// The kernel of the weight's gradient, and its tile.
struct WeightGradientChoice {
  TileShape tile;
  bool warpgroups;
};
WeightGradientChoice choose_weight_gradient(const at::Tensor& source, int64_t rows, int64_t columns);

}  // namespace bap_kernels
