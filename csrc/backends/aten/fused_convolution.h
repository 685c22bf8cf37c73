// A convolution with what follows it in one call of a library, where one has it.
#pragma once

#include "backends/aten/convolution.h"

namespace bap_kernels {

// The result, or nothing where no library has the case: oneDNN and cuDNN take what PyTorch's convolution would hand to
// them; cuDNN's fused calls need a ReLU and a contiguous residual, and are not used where the user wants deterministic
// ones, which they don't promise. The ReLU of both makes zero of NaN. `device` is that of the tensors, except in tests.
std::optional<at::Tensor> fused_convolution(const at::Tensor& x, const at::Tensor& w,
                                            const ConvolutionEpilogue& epilogue, const ConvolutionOptions& options,
                                            c10::DeviceType device);

// Whether a call with a ReLU could go to cuDNN's fused convolution, which wants a bias in every case.
bool cudnn_fuses(at::ScalarType dtype, int64_t groups, c10::DeviceType device);

}  // namespace bap_kernels
