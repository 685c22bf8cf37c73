// Forward of the switched convolution by a masked input, and the full-width result of a depthwise one.
#include "backends/aten/switched_conv2d.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>

#include "backends/aten/gathered_conv2d.h"

namespace bap_kernels {

at::Tensor masked_switched_conv2d(const SwitchedCall& c) {
  const OptionalTensor all;
  if (c.trivial()) return trivial_gathered_conv2d(c.on(all));
  const at::Tensor on = c.switches != 0;
  // The weight as well: zero times what an off channel's weight may hold can be NaN. A product with the switch would
  // keep the NaN of an off channel, a choice does not.
  const at::Tensor x = at::where(on.view({1, -1, 1, 1}), c.input, 0);
  const at::Tensor w = at::where(c.shape.depthwise ? on.view({-1, 1, 1, 1}) : on.view({1, -1, 1, 1}), c.weight, 0);
  const ConvCall dense{x,      w, c.bias, all, all, c.stride, c.padding, c.dilation, c.groups, /*cache_packed=*/false,
                       c.shape};
  return aten_gathered_conv2d(dense, AtenRoute::kGather).contiguous(c.format());
}

at::Tensor widened_result(const SwitchedCall& c, const SwitchLists& lists, const at::Tensor& compact) {
  const auto& s = c.shape;
  if (!s.depthwise || !has_value(lists.on)) return compact;
  at::Tensor y = at::empty({s.batch, s.channels_out, s.out_h, s.out_w}, c.input.options().memory_format(c.format()));
  if (has_value(c.bias)) {
    y.copy_(c.bias->view({1, -1, 1, 1}));
  } else {
    y.zero_();
  }
  return y.index_copy_(1, lists.on->to(at::kLong), compact);
}

}  // namespace bap_kernels
