// The kernels that move and add: compact copies and their inverse, and sums over chunks; see channel_pack_block.h and
// channel_unpack_block.h.
#include "backends/cuda/kernels/channel_pack_block.h"
#include "backends/cuda/kernels/channel_unpack_block.h"
#include "backends/cuda/kernels/launch.cuh"

namespace bap_kernels {

Status launch_channel_pack(const ChannelPackParams& p, MathMode mode, void* stream) {
  switch (mode) {
    case MathMode::kBFloat16:
      return launch_blocks<ChannelPack<BFloat16Word>, 1>(p, ChannelPack<BFloat16Word>::kSharedBytes, stream);
    case MathMode::kHalf:
      return launch_blocks<ChannelPack<HalfWord>, 1>(p, ChannelPack<HalfWord>::kSharedBytes, stream);
    default:
      return launch_blocks<ChannelPack<float>, 1>(p, ChannelPack<float>::kSharedBytes, stream);
  }
}

Status launch_channel_unpack(const ChannelUnpackParams& p, MathMode mode, void* stream) {
  switch (mode) {
    case MathMode::kBFloat16:
      return launch_blocks<ChannelUnpack<BFloat16Word>, 1>(p, ChannelUnpack<BFloat16Word>::kSharedBytes, stream);
    case MathMode::kHalf:
      return launch_blocks<ChannelUnpack<HalfWord>, 1>(p, ChannelUnpack<HalfWord>::kSharedBytes, stream);
    default:
      return launch_blocks<ChannelUnpack<float>, 1>(p, ChannelUnpack<float>::kSharedBytes, stream);
  }
}

Status launch_sum_partials(const SumPartialsParams& p, MathMode mode, void* stream) {
  switch (mode) {
    case MathMode::kBFloat16:
      return launch_blocks<SumPartials<BFloat16Word>, 1>(p, 0, stream);
    case MathMode::kHalf:
      return launch_blocks<SumPartials<HalfWord>, 1>(p, 0, stream);
    default:
      return launch_blocks<SumPartials<float>, 1>(p, 0, stream);
  }
}

const char* status_text(Status status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

int sm_count(int device) {
  int count = 0;
  const Status status = cleared(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return status == cudaSuccess && count > 0 ? count : 1;
}

}  // namespace bap_kernels
