// The step that is a convolution, and three of them as one.
#pragma once

#include <array>
#include <memory>
#include <optional>

#include "ops/conv_call.h"
#include "plan/step_run.h"

namespace bap_kernels {

using Slot = size_t;
using OptionalSlot = std::optional<size_t>;
using OptionalType = std::optional<at::ScalarType>;

inline at::Tensor converted(const at::Tensor& t, OptionalType type) { return type.has_value() ? t.to(*type) : t; }

// A convolution with its weights' layer, all that is fused into it, and a second store.
struct ConvStep : RunStep {
  Slot x, weight, bias, out;
  OptionalSlot residual, second;
  OptionalTensor in_index, out_index, weight_index, second_index;
  OptionalTensor in_scale, in_shift, out_scale, out_shift;
  bool in_relu, out_relu;
  std::optional<double> out_max;
  std::array<int64_t, 2> stride, dilation;
  std::array<int64_t, 4> padding;
  int64_t groups;
  OptionalType type;

  void operator()(Slots& slots) const override;

  // The arguments of a call that changes no dtype, for an input.
  GatheredConv2dFusedArgs<int64_t> args(const at::Tensor& input, const Slots& slots) const;
  // Its result, not computed: for its sizes.
  at::Tensor unwritten_result(const at::Tensor& input, const Slots& slots) const;
};

// Three convolutions of which nobody else reads what lies between them, the middle one of groups: in one pass over
// bands of rows where that is faster, by measurement under `auto` and by rule elsewhere, else one after the other.
struct BlockStep : RunStep {
  std::unique_ptr<const ConvStep> first, depthwise, last;

  void operator()(Slots& slots) const override;

 private:
  bool takes_bands(const BlockCalls& calls, const Slots& slots) const;
  void run_layers(Slots& slots) const;
};

}  // namespace bap_kernels
