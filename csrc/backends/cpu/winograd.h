// Winograd convolutions of the native CPU path: where they apply, whether a call may use them, and their driver.
#pragma once

#include <string>

#include "backends/cpu/gradient_call.h"
#include "backends/cpu/native_call.h"
#include "ops/conv_call.h"

namespace bap_kernels {

// Edges of the tiles of results that there are, m of F(m x m, 3 x 3).
constexpr int64_t kWinogradLarge = 4, kWinogradSmall = 2;

// Why there is no Winograd kernel for a call; empty if there is one.
std::string winograd_unsupported_reason(const ConvCall& call);

// The sizes of tiles that could beat the direct convolution of a supported call: those that are measured, where the
// calling thread allows it.
std::vector<int64_t> winograd_promises(const ConvCall& call);

// For calls that are not measured, where no backend is named: the size of tiles, or 0 for the direct convolution. Where
// the weight is transformed for one call alone, that has to pay, too. Otherwise the batch has no say: in a mixed batch
// a sample's result must not depend on the others.
int64_t unmeasured_winograd(const NativeCall& native, bool weight_is_kept);

// The same for the gradient of the weight.
int64_t winograd_of_weight_gradient(const GradientCall& call);

// Writes the gradients of all listed slices of the weight to their places in `dw`.
void winograd_weight_gradient(const GradientCall& call, int64_t size, at::Tensor& dw);

// Whether a prepared convolution is one that they compute.
bool winograd_applies(const NativeCall& native);

// Transformed filters of the listed slices, [panel][point][channel][lane]; see microkernels/winograd.h.
at::Tensor pack_weight_winograd(const NativeCall& native, int64_t size);

// The work of one call with tiles of `size` x `size`; tasks refer to the arguments.
NativeTasks conv_winograd_tasks(const NativeCall& native, const float* weight, int64_t size, bool channels_last);

// Runs them on all threads.
void run_winograd(const NativeCall& native, const at::Tensor& weight, int64_t size, bool channels_last);

// The call's weight, transformed, from the cache where the call asks for that.
at::Tensor packed_winograd_weight(const ConvCall& call, const NativeCall& native, int64_t size);

// Runs the call, which must be supported and not trivial.
at::Tensor winograd_gathered_conv2d(const ConvCall& call, int64_t size);

}  // namespace bap_kernels
