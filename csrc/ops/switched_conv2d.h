// Contract of the switched convolution: arguments, checks and what a switch says, device-neutral.
//   y = conv2d(x * s, w, b)    s in {0, 1}^C_in, one entry for each input channel; all output channels are computed
// `read`, bool (C_out,), names the output channels that anything reads: the gradient of the others is expected to be
// zero. It changes no result and saves the search for those channels. What it says is compared with the gradient, in
// every call where `reader` is 0; with a number of its own for whoever learns it, where the list is new to that reader
// and in some calls after that.
#pragma once

#include "ops/gathered_conv2d.h"

namespace bap_kernels {

// Raises on any argument that breaks the contract (the switch's values apart: see read_switch) and returns the
// geometry. `switches` is the schema's `switch`, a word that C++ keeps for itself.
template <class Int>
ConvShape<Int> check_switched_conv2d(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                     const OptionalTensor& bias, const at::Tensor& switches, c10::ArrayRef<Int> stride,
                                     c10::ArrayRef<Int> padding, c10::ArrayRef<Int> dilation, const Int& groups);

// Raises unless `read` is absent or has one bool for each output channel.
template <class Int>
void check_read(const char* op, const OptionalTensor& read, const ConvShape<Int>& shape, const at::Tensor& input);

// What a switch says: int32 lists of the channels that are on and off, both increasing.
struct SwitchLists {
  OptionalTensor on;  // null: all
  at::Tensor off;     // defined, (0,) when all are on
};

// Reads a switch in CPU memory; raises on values other than 0 and 1. A switch on a GPU is never read on the host: that
// would stall its stream.
SwitchLists read_switch(const char* op, const at::Tensor& switches);

}  // namespace bap_kernels
