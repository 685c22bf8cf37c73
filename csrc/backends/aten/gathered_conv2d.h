// The gathered convolution through PyTorch's own operators: any device, any dtype, and the peer to beat.
#pragma once

#include "ops/conv_call.h"

namespace bap_kernels {

enum class AtenRoute {
  kGather,        // select the listed channels, then a convolution with the listed weight slices
  kGatherFlat,    // the same, selecting from a channels_last input as a matrix of pixels x channels
  kGatherPacked,  // the same on a CPU, with oneDNN's own order of the weight slices, made beforehand
  kDense,         // the full input with zeros in the weight of unlisted channels
  kMasked,        // the same with zeros in the input too, which no host has to look at: for devices
};

// `conv` and everything fused around it. kDense and kMasked must not be asked for when `dense_route_applies` is false,
// nor kGatherPacked when `packed_convolution_applies` is.
at::Tensor aten_gathered_conv2d(const ConvCall& call, AtenRoute route);

// A dense route exists where leaving the input whole costs less than gathering can: groups == 1 and an in-list.
bool dense_route_applies(const ConvCall& call);

// The bias at the listed outputs, or an undefined tensor.
at::Tensor listed_bias(const ConvCall& call);

// Empty results, and convolutions over no channel at all: the bias and what is fused.
at::Tensor trivial_gathered_conv2d(const ConvCall& call);

}  // namespace bap_kernels
