// One checked call of the gathered convolution, as it travels from dispatch to a backend.
#pragma once

#include <ATen/ops/empty.h>

#include "ops/gathered_conv2d.h"

namespace bap_kernels {

struct ConvCall : GatheredConv2dFusedArgs<int64_t> {
  ConvShape<int64_t> shape;
  // Where a backend may leave the second, compact store that `dual_store_index` asks for, if the launch that writes the
  // result fills it too, in the same memory format. Where it stays undefined, dispatch selects it from the result.
  at::Tensor* dual_store = nullptr;

  // The weight's channels that are read, in order; absent: all.
  const OptionalTensor& weight_list() const { return has_value(weight_index) ? weight_index : in_index; }

  bool symmetric_padding() const { return padding[kTop] == padding[kBottom] && padding[kLeft] == padding[kRight]; }
  int64_t taps() const { return shape.kernel_h * shape.kernel_w; }
  at::MemoryFormat format() const { return input.suggest_memory_format(); }
  bool trivial() const { return shape.trivial(); }
  at::Tensor empty_result(int64_t channels) const {
    return at::empty({shape.batch, channels, shape.out_h, shape.out_w}, input.options().memory_format(format()));
  }
  at::Tensor empty_result() const { return empty_result(shape.kept_out); }

  // The same call for another input of its shape, without the second store.
  ConvCall with_input(const at::Tensor& x) const {
    return {{ConvArgs<int64_t>::with_tensors(x, weight, bias), fusion, cache_packed, weight_index, kAbsent, out_max},
            shape};
  }
};

// Checked calls in a row: 1x1, depthwise and 1x1. The input of each but the first one is the result of the one before;
// it stands for its sizes and strides only, and is neither read nor written.
struct BlockCalls {
  const ConvCall &first, &depthwise, &last;
};

// One checked call of its backward.
struct ConvBackwardCall : GatheredConv2dBackwardArgs<int64_t> {
  ConvShape<int64_t> shape;

  ConvBackwardCall with_input(const at::Tensor& x) const {
    return {{grad_output, x, weight, in_index, out_index, stride, padding, dilation, groups, mask}, shape};
  }
};

}  // namespace bap_kernels
