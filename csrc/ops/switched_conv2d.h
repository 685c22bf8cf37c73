// Contract of the switched convolution: arguments, checks and what a switch says, device-neutral.
//   y = conv2d(x * s, w, b)    s in {0, 1}^C_in, one entry for each input channel; all output channels are computed
#pragma once

#include "ops/gathered_conv2d.h"

namespace bap_kernels {

// Raises on any argument that breaks the contract (the switch's values apart: see read_switch) and returns the
// geometry. `switches` is the schema's `switch`, a word that C++ keeps for itself.
template <class Int>
ConvShape<Int> check_switched_conv2d(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                     const OptionalTensor& bias, const at::Tensor& switches, c10::ArrayRef<Int> stride,
                                     c10::ArrayRef<Int> padding, c10::ArrayRef<Int> dilation, const Int& groups);

// What a switch says: int32 lists of the channels that are on and off, both increasing.
struct SwitchLists {
  OptionalTensor on;  // null: all
  at::Tensor off;     // defined, (0,) when all are on
};

// Reads a switch in CPU memory; raises on values other than 0 and 1. A switch on a GPU is never read on the host: that
// would stall its stream.
SwitchLists read_switch(const char* op, const at::Tensor& switches);

}  // namespace bap_kernels
