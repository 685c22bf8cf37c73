// The gathered convolution of one checked call, by the named backend or the measured choice.
#pragma once

#include <array>

#include "dispatch/backend.h"

namespace bap_kernels {

at::Tensor run_gathered_conv2d(const ConvCall& call, const char* op);

// The result of three calls in a row as one pass over bands of rows, where the native kernels have one and expect to
// gain by it: see backends/cpu/conv_bands.h. An undefined tensor where they do not, and nothing has been computed. The
// input of each call but the first one tells the sizes of what it reads, and is neither read nor written.
at::Tensor banded_conv2d(const std::array<const GatheredConv2dFusedArgs<int64_t>*, 3>& calls);

// The backend of a backward that is not named: CPU kernels where they cover it, else ATen.
const Backend& backward_backend(const at::Tensor& input, const ConvShape<int64_t>& shape);

}  // namespace bap_kernels
