// Element types of the kernels, their conversions, and vectors of 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backends/cuda/kernels/conv_params.h"
#include "backends/cuda/kernels/instances.h"

namespace bap_kernels {

template <MathMode kMode>
struct MathTraits;
template <>
struct MathTraits<MathMode::kBFloat16> {
  using scalar_t = __nv_bfloat16;
};
template <>
struct MathTraits<MathMode::kHalf> {
  using scalar_t = __half;
};
template <>
struct MathTraits<MathMode::kTf32> {
  using scalar_t = float;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

// Rounded to the nearest, ties to even.
template <typename scalar_t>
__device__ __forceinline__ scalar_t from_float(float value) {
  if constexpr (sizeof(scalar_t) == 4) {
    return value;
  } else if constexpr (std::is_same_v<scalar_t, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

// The bits of the nearest TF32 number, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// 16 bytes of elements in registers, loaded from and stored to aligned memory at once.
template <typename scalar_t>
struct alignas(kChunkBytes) Chunk {
  static constexpr int kCount = kChunkBytes / sizeof(scalar_t);
  scalar_t values[kCount];
};
template <typename scalar_t>
__device__ __forceinline__ void load_chunk(Chunk<scalar_t>& chunk, const scalar_t* from) {
  reinterpret_cast<uint4&>(chunk) = *reinterpret_cast<const uint4*>(from);
}
template <typename scalar_t>
__device__ __forceinline__ void store_chunk(scalar_t* to, const Chunk<scalar_t>& chunk) {
  *reinterpret_cast<uint4*>(to) = reinterpret_cast<const uint4&>(chunk);
}

// Adds the vectors that lie `stride` apart from `terms` on, in their order.
template <int kWidth>
__device__ __forceinline__ void add_terms(float (&sum)[kWidth], const float* terms, int64_t stride, int count) {
  static_assert(kWidth == 1 || kWidth == Chunk<float>::kCount, "a number, or 16 bytes");
#pragma unroll 4
  for (int s = 0; s < count; ++s, terms += stride) {
    if constexpr (kWidth == 1) {
      sum[0] += *terms;
    } else {
      Chunk<float> chunk;
      load_chunk(chunk, terms);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) sum[v] += chunk.values[v];
    }
  }
}

template <typename scalar_t>
__device__ __forceinline__ float vector_value(const VectorParams& v, int i) {
  return v.is_float ? static_cast<const float*>(v.values)[i] : to_float(static_cast<const scalar_t*>(v.values)[i]);
}

// NaN stays NaN, as in torch.
__device__ __forceinline__ float rectified(float value) { return value < 0.0f ? 0.0f : value; }

// relu?(scale[i] * from + shift[i]), rounded.
template <typename scalar_t>
__device__ __forceinline__ scalar_t transformed(const VectorParams& scale, const VectorParams& shift, bool relu,
                                                scalar_t from, int i) {
  float value = to_float(from);
  if (scale.values != nullptr) value *= vector_value<scalar_t>(scale, i);
  if (shift.values != nullptr) value += vector_value<scalar_t>(shift, i);
  return from_float<scalar_t>(relu ? rectified(value) : value);
}

}  // namespace bap_kernels
