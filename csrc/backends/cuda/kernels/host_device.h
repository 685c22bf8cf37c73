// What lets one function be compiled for the device and for the host: the arithmetic that kernels and their launchers
// share.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BAP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BAP_HOST_DEVICE inline
#endif

namespace bap_kernels {

BAP_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A number that the host divides by once, so that the device multiplies and shifts instead: exact for dividends from 0
// to 2^31 - 1 (Granlund and Montgomery, "Division by Invariant Integers using Multiplication", figure 4.1).
struct Divisor {
  uint32_t number, factor, shift;

  BAP_HOST_DEVICE int count() const { return static_cast<int>(number); }
  BAP_HOST_DEVICE int quotient(int n) const {
    const auto dividend = static_cast<uint32_t>(n);
    const auto high = static_cast<uint32_t>(uint64_t{factor} * dividend >> 32);
    return static_cast<int>((high + dividend) >> shift);
  }
  // What is left of n by its quotient.
  BAP_HOST_DEVICE int rest(int n, int quotient) const { return n - quotient * static_cast<int>(number); }
};

// A divisor of 0, of an empty axis, may be applied to 0 alone.
inline constexpr Divisor divisor_of(int number) {
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < static_cast<uint64_t>(number)) ++shift;
  if (number <= 0) return {0, 0, 0};
  const auto n = static_cast<uint64_t>(number);
  return {static_cast<uint32_t>(n), static_cast<uint32_t>((((uint64_t{1} << shift) - n) << 32) / n + 1), shift};
}

}  // namespace bap_kernels
