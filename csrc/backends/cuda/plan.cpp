// See plan.h.
#include "backends/cuda/plan.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "backends/cuda/kernels/halo_shape.h"

namespace bap_kernels {
namespace {

int64_t vector_of(const at::Tensor& t) { return 16 / static_cast<int64_t>(t.element_size()); }

// Whether the kernel with a halo takes a forward as it lies.
bool takes_halo(const ConvLaunch& l) {
  if (l.gradient || l.full_width) return false;
  ConvParams p{};
  const at::Tensor& x = l.source;
  p.source_stride = {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  p.axis_h = l.h;
  p.axis_w = l.w;
  for (const LaunchRun& run : l.runs) {
    p.runs.of[0].depth = std::max(p.runs.of[0].depth, static_cast<int>(run.list.length));
  }
  p.runs.count = 1;
  p.batch = static_cast<int>(x.size(0));
  p.columns = static_cast<int>(l.columns);
  const auto address = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  // Whether a tile fits is independent of the number of SMs.
  return choose_halo(halo_case(p, address, static_cast<int>(x.element_size())), 1).fits;
}

// The kernels that multiply by rows or planes.
FamilySet gemm_families(ConvLaunch l, ConvRoute route, FamilyMath math) {
  l.route = route;
  FamilySet all = 0;
  for_chunks(l.runs, [&](size_t, size_t, int images) {
    const GemmChoice choice = choose_gemm(l, images);
    const CudaKernel rows = l.gradient ? CudaKernel::kInputGradient : CudaKernel::kNhwc;
    const CudaKernel kernel = choice.warpgroups             ? CudaKernel::kWgmma
                              : route == ConvRoute::kPlanes ? CudaKernel::kPlanar
                                                            : rows;
    all |= family(kernel, math);
    if (choice.parts > 1) all |= family(CudaKernel::kSplit, math);
  });
  return all;
}

}  // namespace

ResultLayout layout_of(const at::Tensor& result) { return {result.stride(3) == 1, result.stride(1) == 1}; }

ResultLayout layout_of_like(const at::Tensor& t) { return layout_of(at::empty_like(t, t.options().device(at::kMeta))); }

ResultLayout layout_of_new(at::MemoryFormat format, int64_t channels, int64_t pixels) {
  const bool last = format == at::MemoryFormat::ChannelsLast;
  return {!last || channels == 1, last || pixels == 1};
}

ConvPlan plan_conv(const ConvLaunch& l, const std::optional<ResultLayout>& result, bool prologue, bool aligned) {
  const int64_t vector = vector_of(l.source);
  const FamilyMath math = math_of(l.source);
  ConvPlan plan;
  const auto of_rows = [&] {
    plan.spreads = result && result->planes && !result->rows;
    plan.families = gemm_families(l, ConvRoute::kRows, math);
    if (plan.packs || plan.spreads) plan.families |= family(CudaKernel::kPack, math);
    return plan;
  };
  if (aligned) return of_rows();
  if (!prologue) {
    const bool planes = pointwise({l.h, l.w}) && !l.gradient && result && result->planes;
    if (planes && aligned_chunks(l.source, true)) {
      plan.route = ConvRoute::kPlanes;
      plan.families = gemm_families(l, plan.route, math);
      return plan;
    }
    const bool blocks =
        std::all_of(l.runs.begin(), l.runs.end(), [&](const LaunchRun& run) { return run.list.block % vector == 0; });
    if (blocks && aligned_chunks(l.source, false)) return of_rows();
  }
  if (result && takes_halo(l)) {
    plan.route = ConvRoute::kHalo;
    plan.families = family(CudaKernel::kHalo, math);
    return plan;
  }
  plan.packs = true;
  return of_rows();
}

GemmChoice choose_gemm(const ConvLaunch& l, int64_t images) {
  const bool planes = l.route == ConvRoute::kPlanes;
  const auto along = [&](const ConvAxis& axis) {
    return static_cast<int64_t>(l.gradient ? ceil_div(axis.input, axis.stride) : axis.output);
  };
  // Of the phase that meets most of them.
  const auto taps = [&](const ConvAxis& axis) {
    return static_cast<int64_t>(l.gradient ? ceil_div(axis.kernel, axis.stride) : axis.kernel);
  };
  int64_t depth = 0;
  for (const LaunchRun& run : l.runs) depth = std::max(depth, run.list.length);
  const int64_t step = kDepthBytes / static_cast<int64_t>(l.source.element_size());
  const int64_t pixels = along(l.h) * along(l.w), steps = tiles_of(depth, step) * taps(l.h) * taps(l.w);
  const DeviceFacts device = device_facts(l.source);
  GemmChoice choice{};
  choice.grids = planes ? images : l.gradient ? l.h.stride * l.w.stride : 1;
  choice.rows = planes ? pixels : pixels * images;
  const bool covered =
      math_of(l.source) != FamilyMath::kTf32 && !planes && !has_value(l.grad_switch) && device.has_warpgroups;
  choice.tile = choose_tile(choice.rows, l.columns, choice.grids, planes, device.sm_count, covered, steps);
  choice.warpgroups = covered && choice.tile == TileShape::kLarge;
  choice.warpgroup_tile = choose_warpgroup_tile(choice.rows, l.columns, choice.grids, device.sm_count);
  const int64_t tiles = tiles_of(choice.tile, choice.rows, l.columns, choice.grids);
  choice.parts = planes ? 1 : choose_parts(tiles, steps, device.sm_count);
  return choice;
}

WeightGradientChoice choose_weight_gradient(const at::Tensor& source, int64_t rows, int64_t columns) {
  const TileShape tile = choose_weight_tile(rows, columns);
  const bool covered = tile == TileShape::kLarge && math_of(source) != FamilyMath::kTf32;
  return {tile, covered && device_facts(source).has_warpgroups};
}

WeightGradientPlan plan_weight_gradient(const at::Tensor& grad, const at::Tensor& input, int64_t rows,
                                        const ListForm& columns) {
  const FamilyMath math = math_of(input);
  WeightGradientPlan plan;
  plan.packs_grad = !aligned_chunks(grad, false);
  plan.packs_input = columns.block % vector_of(input) != 0 || !aligned_chunks(input, false);
  const bool warpgroups = choose_weight_gradient(input, rows, columns.length).warpgroups;
  plan.families = family(warpgroups ? CudaKernel::kWgmmaWeightGradient : CudaKernel::kWeightGradient, math);
  if (plan.packs_grad || plan.packs_input) plan.families |= family(CudaKernel::kPack, math);
  return plan;
}

}  // namespace bap_kernels
