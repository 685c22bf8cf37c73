// Element types of the CUDA kernels as words, and their conversions on the device and on the host.
#pragma once

#include <cstring>

#include "backends/cuda/kernels/host_device.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace bap_kernels {

// The math mode of a kernel: the type that the tensor cores multiply. There is none for IEEE float32: sums of products
// of TF32 parts would miss it, since tensor cores truncate what they add.
enum class MathMode : int { kBFloat16, kHalf, kTf32 };

struct BFloat16Word {
  uint16_t bits;
};
struct HalfWord {
  uint16_t bits;
};

BAP_HOST_DEVICE uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

BAP_HOST_DEVICE float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

BAP_HOST_DEVICE float to_float(float value) { return value; }
BAP_HOST_DEVICE float to_float(BFloat16Word value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
BAP_HOST_DEVICE float to_float(HalfWord value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x0400u) return float_of(sign | ((rest << 13) + (112u << 23)));
  const float small = static_cast<float>(rest) * 0x1p-24f;
  return sign ? -small : small;
#endif
}

// Rounded to the nearest, ties to even.
template <typename scalar_t>
BAP_HOST_DEVICE scalar_t from_float(float value);
template <>
BAP_HOST_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
BAP_HOST_DEVICE BFloat16Word from_float<BFloat16Word>(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
BAP_HOST_DEVICE HalfWord from_float<HalfWord>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bits_of(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (rest < 0x38800000u) {
    // The sum leaves the bits of a denormal number at the end of the mantissa, rounded by the addition itself.
    const uint32_t sum = bits_of(float_of(rest) + 0.5f);
    return {static_cast<uint16_t>(sign | (sum - 0x3f000000u))};
  }
  const uint32_t rounded = rest + 0xfffu + ((rest >> 13) & 1u) - (112u << 23);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
#endif
}

// The bits of the nearest TF32 number, ties away from zero; what is not finite stays what it is.
BAP_HOST_DEVICE uint32_t to_tf32(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
#else
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
#endif
}

template <MathMode kMode>
struct MathTraits;
template <>
struct MathTraits<MathMode::kBFloat16> {
  using scalar_t = BFloat16Word;
};
template <>
struct MathTraits<MathMode::kHalf> {
  using scalar_t = HalfWord;
};
template <>
struct MathTraits<MathMode::kTf32> {
  using scalar_t = float;
};

}  // namespace bap_kernels
