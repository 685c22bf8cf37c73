// Parameters and launcher of the channel gather. No torch header may be included here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace bap_kernels {

// Sizes are elements, strides are elements of `element_bytes` each.
struct ChannelGatherParams {
  const void* x;         // (N, C_in, H, W), any strides
  const int32_t* index;  // (K_in,), within [0, C_in)
  void* y;               // (N, K_in, H, W), contiguous, or channels_last where `channels_last`
  int64_t batch, channels, kept, height, width;
  int64_t stride_xn, stride_xc, stride_xh, stride_xw;
  int64_t stride_index;
  int element_bytes;  // 1, 2, 4 or 8
  bool channels_last;
};

// Enqueues the copy on `stream` of the current device; returns the launch's status.
cudaError_t launch_channel_gather(const ChannelGatherParams& params, cudaStream_t stream);

}  // namespace bap_kernels
