// Contract of the switched convolution: its ops, their arguments, their checks and what a switch says, device-neutral.
//   y = conv2d(x * s, w, b)    s in {0, 1}^C_in, one entry for each input channel; all output channels are computed
// `read`, bool (C_out,), names the output channels that anything reads: the gradient of the others is expected to be
// zero. It changes no result and saves the search for those channels. What it says is compared with the gradient, in
// every call where `reader` is 0; with a number of its own for whoever learns it, where the list is new to that reader
// and in some calls after that.
#pragma once

#include "ops/gathered_conv2d.h"

namespace bap_kernels {

// Which of the four gradients are computed.
enum SwitchedGradient : int { kGradInput = 0, kGradWeight = 1, kGradBias = 2, kGradSwitch = 3 };
using SwitchedMask = std::array<bool, 4>;
// In the order of SwitchedGradient; those not computed have the shape (0,).
using SwitchedGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <class Int>
struct SwitchedConv2dArgs {
  const at::Tensor& input;
  const at::Tensor& weight;
  const OptionalTensor& bias;
  const at::Tensor& switches;  // the schema's `switch`, a word that C++ keeps for itself
  c10::ArrayRef<Int> stride, padding, dilation;
  Int groups;
  bool off_gradient;  // whether the switch's gradient of channels that are off is computed
  const OptionalTensor& read;
  int64_t reader;

  auto tie() const {
    return std::tie(input, weight, bias, switches, stride, padding, dilation, groups, off_gradient, read, reader);
  }
  SwitchedConv2dArgs with_tensors(const at::Tensor& x, const at::Tensor& w, const OptionalTensor& b) const {
    return {x, w, b, switches, stride, padding, dilation, groups, off_gradient, read, reader};
  }
  // The convolution without the switch, or with it as lists.
  ConvArgs<Int> conv(const OptionalTensor& in_index = kAbsent, const OptionalTensor& out_index = kAbsent) const {
    return {input, weight, bias, in_index, out_index, stride, padding, dilation, groups};
  }
};

struct SwitchedConv2d {
  static constexpr const char* kName = "switched_conv2d";
  static constexpr const char* kSchema =
      "(Tensor input, Tensor weight, Tensor? bias, Tensor switch, SymInt[2] stride, SymInt[4] padding, "
      "SymInt[2] dilation, SymInt groups, bool off_gradient=True, Tensor? read=None, int reader=0) -> Tensor";
  using Result = at::Tensor;
  template <class Int>
  using Args = SwitchedConv2dArgs<Int>;
};

template <class Int>
struct SwitchedConv2dBackwardArgs {
  const at::Tensor& grad_output;
  const at::Tensor& input;
  const at::Tensor& weight;
  const at::Tensor& switches;
  c10::ArrayRef<Int> stride, padding, dilation;
  Int groups;
  bool off_gradient;
  SwitchedMask mask;
  const OptionalTensor& read;
  int64_t reader;

  auto tie() const {
    return std::tie(grad_output, input, weight, switches, stride, padding, dilation, groups, off_gradient, mask, read,
                    reader);
  }
  SwitchedConv2dArgs<Int> forward() const {
    return {input, weight, kAbsent, switches, stride, padding, dilation, groups, off_gradient, read, reader};
  }
};

struct SwitchedConv2dBackward {
  static constexpr const char* kName = "switched_conv2d_backward";
  static constexpr const char* kSchema =
      "(Tensor grad_output, Tensor input, Tensor weight, Tensor switch, SymInt[2] stride, SymInt[4] padding, "
      "SymInt[2] dilation, SymInt groups, bool off_gradient, bool[4] output_mask, Tensor? read=None, int reader=0) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_switch)";
  using Result = SwitchedGradients;
  template <class Int>
  using Args = SwitchedConv2dBackwardArgs<Int>;
};

// A GPU's way on any device, for tests and comparisons; without gradients of its own.
struct SwitchedConv2dMasked : SwitchedConv2d {
  static constexpr const char* kName = "_switched_conv2d_masked";
};
struct SwitchedConv2dMaskedBackward : SwitchedConv2dBackward {
  static constexpr const char* kName = "_switched_conv2d_masked_backward";
};

// Raises on any argument that breaks the contract (the switch's values apart: see read_switch) and returns the
// geometry.
template <class Int>
ConvShape<Int> check_switched_conv2d(const char* op, const SwitchedConv2dArgs<Int>& args);

template <class Int>
ConvShape<Int> check_switched_conv2d_backward(const char* op, const SwitchedConv2dBackwardArgs<Int>& args) {
  const auto shape = check_switched_conv2d<Int>(op, args.forward());
  check_grad_output<Int>(op, args.grad_output, shape, args.input);
  return shape;
}

// What a switch says: int32 lists of the channels that are on and off, both increasing.
struct SwitchLists {
  OptionalTensor on;  // null: all
  at::Tensor off;     // defined, (0,) when all are on
};

// Reads a switch in CPU memory; raises on values other than 0 and 1. A switch on a GPU is never read on the host: that
// would stall its stream.
SwitchLists read_switch(const char* op, const at::Tensor& switches);

}  // namespace bap_kernels
