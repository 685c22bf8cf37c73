// Sums over chunks, put at the listed places of a gradient.
//   result[row_list[j], column_list[i], kh, kw] = sum over chunks s, in order, of partial[s, j, t, i]
//
// A thread adds one entry. Grid: (entries).
// Computes in float32. No atomics: the result does not vary between runs.
#include "backends/cuda/kernels/elements.cuh"
#include "backends/cuda/kernels/launch.cuh"

namespace bap_kernels {

constexpr int kThreads = 256;

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1) sum_partials_kernel(const __grid_constant__ SumPartialsParams p) {
  const int e = blockIdx.x * kThreads + threadIdx.x;
  if (e >= p.rows * p.taps * p.columns) return;
  const int i = e % p.columns, tap = e / p.columns % p.taps, j = e / p.columns / p.taps;
  if (p.used != nullptr && i >= *p.used) return;
  const float* terms = p.partial + j * p.stride_row + tap * p.stride_tap + i;
  float sum[1] = {};
  add_terms(sum, terms, p.stride_chunk, p.chunks);
  const int64_t row = listed_channel(p.row_list, j);
  const int64_t column = listed_channel(p.column_list, i);
  const int64_t at = row * p.result_stride.n + column * p.result_stride.c + tap / p.kernel_w * p.result_stride.h +
                     tap % p.kernel_w * p.result_stride.w;
  if (p.result_is_float) {
    static_cast<float*>(p.result)[at] = sum[0];
  } else {
    static_cast<scalar_t*>(p.result)[at] = from_float<scalar_t>(sum[0]);
  }
}

Status launch_sum_partials(const SumPartialsParams& p, MathMode mode, void* stream) {
  const dim3 grid(ceil_div(p.rows * p.taps * p.columns, kThreads));
  return with_element(
      mode, [&](auto element) { return launch(sum_partials_kernel<decltype(element)>, p, grid, kThreads, 0, stream); });
}

}  // namespace bap_kernels
