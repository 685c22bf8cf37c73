// The weight and the bias that PyTorch's convolution gets for a call, with what is fused around the call folded in:
//   w'[o, i] = out_scale[o] * w[o, i] * in_scale[i]      b' = out_scale * bias + out_shift
// in float32 for 16-bit dtypes and rounded once. in_scale alone can be folded: a shift is not zero where the padding
// is, and a ReLU stands between the two. Both are kept packed, and made anew where one of the vectors changed; where
// nothing may be kept, to fold at every call would cost more than it saves, and scales are left.
#pragma once

#include <c10/util/FunctionRef.h>

#include "ops/conv_call.h"

namespace bap_kernels {

enum class WeightForm {
  kSliced,     // the listed slices, in the call's format
  kZeroed,     // the listed filters over all input channels, zeros where the input is not listed
  kReordered,  // the listed slices in oneDNN's own order
};

struct Operands {
  at::Tensor weight, bias;  // the bias is undefined where there is none
  bool prologue;            // whether the call's prologue is left to do
  bool scale;               // whether out_scale and out_shift are
};

// `reorder` turns the slices into oneDNN's order, and `variant` tells orders apart; unused for the other forms. With
// `zero_bias` zeros stand for a bias where there is none. `device` is that of the tensors, except in tests.
Operands operands_of(const ConvCall& call, WeightForm form, int variant, bool zero_bias, c10::DeviceType device,
                     c10::function_ref<at::Tensor(const at::Tensor&)> reorder);

}  // namespace bap_kernels
