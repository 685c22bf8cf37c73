// The way from a checked call to the CUDA C++ kernels: its plan, its packed weight and its lists. The kernels are in
// bap_kernels._C_cuda; see launcher.h, and plan.h for the routes.
#pragma once

#include "backends/cuda/plan.h"
#include "dispatch/backend.h"

namespace bap_kernels {

// The backend's functions: see Backend.
at::Tensor cuda_gathered_conv2d(const ConvCall& call, const char* op);
GradientTriple cuda_gathered_conv2d_backward(const ConvBackwardCall& call);
void cuda_gathered_conv2d_mixed(const MixedCall& call, const char* op);
at::Tensor cuda_switched_conv2d(const SwitchedCall& call);
SwitchedGradients cuda_switched_conv2d_backward(const SwitchedBackwardCall& call);

// Launches a convolution as it was planned, from its source as it lies. `used`: how many channels of the list are read,
// on the device; absent: all.
void launch_planned(ConvLaunch& launch, const ConvPlan& plan, const OptionalTensor& used = {},
                    const Fusion& prologue = {});

// Fills in a forward's source and axes: of strided 1x1 convolutions only the pixels that they meet.
void place_forward(ConvLaunch& launch, const at::Tensor& input, const at::Tensor& weight, int64_t out_h, int64_t out_w,
                   c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation);

// A launch without its weights and vectors, and what it will run.
struct PlannedConv {
  ConvLaunch launch;
  ConvPlan plan;
};
PlannedConv plan_forward(const ConvCall& call);
PlannedConv plan_mixed(const MixedCall& call);
// `order`: all channels, as the switch orders them.
PlannedConv plan_switched(const SwitchedCall& call, const ListForm& order);
PlannedConv plan_input_gradient(const ConvBackwardCall& call, const ResultLayout& result);
PlannedConv plan_switched_gradient(const SwitchedBackwardCall& call, const ListForm& order);

// `t`, or a compact NHWC copy of it, whose channels can be copied in runs of 16 bytes.
at::Tensor with_aligned_chunks(const at::Tensor& t);

// The weight's gradient into `result`; `used`: how many channels of `columns` are read and stored, on the device.
void run_weight_gradient(const at::Tensor& result, const at::Tensor& grad, const at::Tensor& input,
                         const ListForm& rows, const ListForm& columns, const OptionalTensor& used,
                         const std::array<ConvAxis, 2>& axes);

}  // namespace bap_kernels
