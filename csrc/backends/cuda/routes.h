// The way from a checked call to the CUDA C++ kernels: which route a call takes, its packed weight and its lists. The
// kernels are in bap_kernels._C_cuda; see launcher.h.
//
// Routes of the forward and of the input's gradient:
//   planes  1x1 convolutions of planes whose runs of 16 bytes are aligned: any list
//   direct  NHWC with aligned runs of 16 bytes, without a list or with one of aligned blocks of 8, 16 or 32 channels
//   halo    forwards of several taps whose halo fits into shared memory: any list, any strides (choose_halo)
//   packed  everything else: the listed channels are first copied into a compact NHWC tensor
// Results of planes of the routes `direct` and `packed` are computed in a compact NHWC tensor and spread from there.
#pragma once

#include "backends/cuda/launches.h"
#include "dispatch/backend.h"

namespace bap_kernels {

// The backend's functions: see Backend.
at::Tensor cuda_gathered_conv2d(const ConvCall& call, const char* op);
GradientTriple cuda_gathered_conv2d_backward(const ConvBackwardCall& call);
void cuda_gathered_conv2d_mixed(const MixedCall& call, const char* op);
at::Tensor cuda_switched_conv2d(const SwitchedCall& call);
SwitchedGradients cuda_switched_conv2d_backward(const SwitchedBackwardCall& call);

// Fills in the launch's source, packed first where the kernels cannot read it, and launches it. The launch has its
// runs.
void run_conv_route(ConvLaunch& launch, const at::Tensor& source, const OptionalTensor& used = {},
                    const Fusion& prologue = {});

// The forward: also fills in the geometry. `used`: how many channels of the list are read, on the device; absent: all.
void run_forward(ConvLaunch& launch, const at::Tensor& input, const at::Tensor& weight, int64_t out_h, int64_t out_w,
                 c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation,
                 const OptionalTensor& used, const Fusion& prologue);

// `t`, or a compact NHWC copy of it, whose channels can be copied in runs of 16 bytes.
at::Tensor with_aligned_chunks(const at::Tensor& t);

// The weight's gradient into `result`; `used`: how many channels of `columns` are read and stored, on the device.
void run_weight_gradient(const at::Tensor& result, const at::Tensor& grad, const at::Tensor& input,
                         const ListForm& rows, const ListForm& columns, const OptionalTensor& used,
                         const std::array<ConvAxis, 2>& axes);

}  // namespace bap_kernels
