// The gathered convolution of one checked call, by the named backend or the measured choice.
#pragma once

#include "dispatch/backend.h"

namespace bap_kernels {

at::Tensor run_gathered_conv2d(const ConvCall& call, const char* op);

// The backend of a backward that is not named: CPU kernels where they cover it, else ATen.
const Backend& backward_backend(const at::Tensor& input, const ConvShape<int64_t>& shape);

}  // namespace bap_kernels
