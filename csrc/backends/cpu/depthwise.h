// Depthwise convolutions and poolings of the native CPU path: where they apply, and their driver.
#pragma once

#include <string>

#include "backends/cpu/microkernels/depthwise.h"
#include "backends/cpu/native_call.h"
#include "ops/conv_call.h"

namespace bap_kernels {

// Why there is no kernel for a depthwise call; empty if there is one.
std::string depthwise_unsupported_reason(const ConvCall& call);

// Runs a supported call that is not trivial.
at::Tensor depthwise_gathered_conv2d(const ConvCall& call);

// The call's weight as the driver wants it, from the cache where the call asks for that.
at::Tensor packed_depthwise_weight(const ConvCall& call, const NativeCall& native);

// Rows of results of a channels_last call, counted through the batch.
RangeRun depthwise_rows(const NativeCall& native, const float* weight);

// How many threads are worth waking for a call.
int depthwise_threads(const NativeCall& native);

// Runs a prepared call; `weight` is packed, or null where `op` needs none.
void run_depthwise(const NativeCall& native, micro::TapOp op, const float* weight, bool channels_last);

}  // namespace bap_kernels
