// Forward of the switched convolution by a masked input.
#include "backends/aten/switched_conv2d.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>

#include "backends/aten/gathered_conv2d.h"
#include "ops/fusion.h"

namespace bap_kernels {

at::Tensor masked_switched_conv2d(const SwitchedCall& c) {
  if (c.trivial()) return trivial_result(c.on(kAbsent));
  const at::Tensor on = c.switches != 0;
  // The weight as well: zero times what an off channel's weight may hold can be NaN. A product with the switch would
  // keep the NaN of an off channel, a choice does not.
  const at::Tensor x = at::where(on.view({1, -1, 1, 1}), c.input, 0);
  const at::Tensor w = at::where(c.shape.depthwise ? on.view({-1, 1, 1, 1}) : on.view({1, -1, 1, 1}), c.weight, 0);
  const ConvCall dense{{c.with_tensors(x, w, c.bias).conv()}, c.shape};
  return aten_gathered_conv2d(dense, Candidate::kGather).contiguous(c.format());
}

}  // namespace bap_kernels
