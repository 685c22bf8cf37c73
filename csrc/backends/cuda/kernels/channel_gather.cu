// Copies the listed channels of a planar or an NHWC tensor. No torch header may be included here.
//   y[n, i, h, w] = x[n, index[i], h, w]
// Planar: a run is what lies contiguous in a plane of x, the whole plane or one of its rows. A block copies blockDim.y
//   runs, in words as wide as the alignment of every run allows, at most 16 bytes. Grid: (groups of runs, slices of a
//   run).
// Strided: a thread copies one element, neighbouring threads neighbouring elements of y. Grid: (elements of y).
// Shared memory: none.
// Needs:  index within [0, C_in), asserted on the device.
// Allows: any strides of x; repeats in index.
// Accumulates nothing. No atomics: the result does not vary between runs.

#include "backends/cuda/kernels/channel_gather.h"

#include <algorithm>
#include <cassert>

namespace bap_kernels {
namespace {

constexpr int kThreads = 256;
// Words that a thread of the planar kernel copies before a run is cut into slices.
constexpr int kWordsPerThread = 8;
constexpr int64_t kMaxGridX = 0x7fffffff;
constexpr int64_t kMaxGridY = 0xffff;

__device__ __forceinline__ int64_t listed_channel(const ChannelGatherParams& p, int64_t i) {
  const int64_t channel = p.index[i * p.stride_index];
  assert(channel >= 0 && channel < p.channels);
  return channel;
}

template <typename word_t>
__global__ void channel_gather_planar_kernel(ChannelGatherParams p, int64_t runs_per_plane, int64_t run_words) {
  const int64_t runs = p.batch * p.kept * runs_per_plane;
  const int64_t run = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (run >= runs) return;
  const int64_t plane = run / runs_per_plane;
  const int64_t row = run - plane * runs_per_plane;
  const int64_t n = plane / p.kept;
  const int64_t channel = listed_channel(p, plane - n * p.kept);
  const int64_t offset = n * p.stride_xn + channel * p.stride_xc + row * p.stride_xh;
  const char* source = static_cast<const char*>(p.x) + offset * p.element_bytes;
  const word_t* from = reinterpret_cast<const word_t*>(source);
  word_t* to = static_cast<word_t*>(p.y) + run * run_words;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.x;
#pragma unroll 4
  for (int64_t k = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x; k < run_words; k += step) {
    to[k] = from[k];
  }
}

template <typename word_t, bool kChannelsLast>
__global__ void channel_gather_strided_kernel(ChannelGatherParams p) {
  const int64_t total = p.batch * p.kept * p.height * p.width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const word_t* x = static_cast<const word_t*>(p.x);
  word_t* y = static_cast<word_t*>(p.y);
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < total; k += step) {
    int64_t rest = k, i, h, w;
    if (kChannelsLast) {
      i = rest % p.kept, rest /= p.kept;
      w = rest % p.width, rest /= p.width;
      h = rest % p.height, rest /= p.height;
    } else {
      w = rest % p.width, rest /= p.width;
      h = rest % p.height, rest /= p.height;
      i = rest % p.kept, rest /= p.kept;
    }
    y[k] = x[rest * p.stride_xn + listed_channel(p, i) * p.stride_xc + h * p.stride_xh + w * p.stride_xw];
  }
}

template <typename word_t>
cudaError_t launch_planar(const ChannelGatherParams& p, int64_t runs_per_plane, int64_t run_bytes,
                          cudaStream_t stream) {
  const int64_t run_words = run_bytes / static_cast<int64_t>(sizeof(word_t));
  const int64_t runs = p.batch * p.kept * runs_per_plane;
  int threads_x = 8;
  while (threads_x < kThreads && threads_x < run_words) threads_x *= 2;
  const dim3 block(threads_x, kThreads / threads_x);
  const int64_t groups = (runs + block.y - 1) / block.y;
  const int64_t slices = (run_words + threads_x * kWordsPerThread - 1) / (threads_x * kWordsPerThread);
  if (groups > kMaxGridX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(std::min(slices, kMaxGridY)));
  channel_gather_planar_kernel<word_t><<<grid, block, 0, stream>>>(p, runs_per_plane, run_words);
  return cudaGetLastError();
}

template <typename word_t>
cudaError_t launch_strided(const ChannelGatherParams& p, cudaStream_t stream) {
  const int64_t total = p.batch * p.kept * p.height * p.width;
  const auto blocks = static_cast<unsigned>(std::min((total + kThreads - 1) / kThreads, kMaxGridX));
  if (p.channels_last) {
    channel_gather_strided_kernel<word_t, true><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    channel_gather_strided_kernel<word_t, false><<<blocks, kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

// The widest word, in bytes, that every run of x and y starts and ends on.
int64_t common_word(const ChannelGatherParams& p, int64_t runs_per_plane, int64_t run_bytes) {
  const int64_t bytes = p.element_bytes;
  const int64_t row_step = runs_per_plane > 1 ? p.stride_xh * bytes : 0;
  const int64_t bits = reinterpret_cast<intptr_t>(p.x) | reinterpret_cast<intptr_t>(p.y) | run_bytes |
                       (p.batch > 1 ? p.stride_xn * bytes : 0) | p.stride_xc * bytes | row_step;
  int64_t word = 16;
  while (bits % word != 0) word /= 2;
  return word;
}

}  // namespace

cudaError_t launch_channel_gather(const ChannelGatherParams& p, cudaStream_t stream) {
  if (p.batch * p.kept * p.height * p.width == 0) return cudaSuccess;
  const bool rows_contiguous = p.stride_xw == 1 || p.width == 1;
  if (!p.channels_last && rows_contiguous) {
    const bool plane_contiguous = p.height == 1 || p.stride_xh == p.width;
    const int64_t runs_per_plane = plane_contiguous ? 1 : p.height;
    const int64_t run_bytes = p.width * (plane_contiguous ? p.height : 1) * p.element_bytes;
    switch (common_word(p, runs_per_plane, run_bytes)) {
      case 16:
        return launch_planar<int4>(p, runs_per_plane, run_bytes, stream);
      case 8:
        return launch_planar<int64_t>(p, runs_per_plane, run_bytes, stream);
      case 4:
        return launch_planar<int32_t>(p, runs_per_plane, run_bytes, stream);
      case 2:
        return launch_planar<int16_t>(p, runs_per_plane, run_bytes, stream);
      default:
        return launch_planar<int8_t>(p, runs_per_plane, run_bytes, stream);
    }
  }
  switch (p.element_bytes) {
    case 8:
      return launch_strided<int64_t>(p, stream);
    case 4:
      return launch_strided<int32_t>(p, stream);
    case 2:
      return launch_strided<int16_t>(p, stream);
    default:
      return launch_strided<int8_t>(p, stream);
  }
}

}  // namespace bap_kernels
