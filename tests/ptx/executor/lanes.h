// How instructions see registers: as values of a type, lane by lane.
#pragma once

#include <bit>
#include <cstring>
#include <type_traits>

#include "block.h"

namespace ptx {

// A predicate.
struct Bit {};

template <typename T>
struct Raw {
  using type = T;
  static T read(uint64_t raw) {
    if constexpr (std::is_same_v<T, float>) {
      return std::bit_cast<float>(static_cast<uint32_t>(raw));
    } else {
      return static_cast<T>(raw);
    }
  }
  // Signed values are extended, so that wider reads of the register see what the conversion rules say.
  static uint64_t write(T value) {
    if constexpr (std::is_same_v<T, float>) {
      return std::bit_cast<uint32_t>(value);
    } else if constexpr (std::is_signed_v<T>) {
      return static_cast<uint64_t>(static_cast<int64_t>(value));
    } else {
      return value;
    }
  }
};
template <>
struct Raw<Bit> {
  using type = bool;
  static bool read(uint64_t raw) { return raw & 1; }
  static uint64_t write(bool value) { return value; }
};

template <class Body>
inline void each_lane(uint32_t mask, Body body) {
  if (mask == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) body(lane);
  } else {
    for (uint32_t left = mask; left != 0; left &= left - 1) body(std::countr_zero(left));
  }
}

inline float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
inline uint16_t to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline float from_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
}
inline uint16_t to_half(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // 65520 and up
  if (magnitude < 0x38800000u) {
    // Below the least normal number: in units of 2^-24, to the nearest even one.
    const float units = std::bit_cast<float>(magnitude) * 0x1p24f;
    auto whole = static_cast<uint32_t>(units);
    const float rest = units - static_cast<float>(whole);
    if (rest > 0.5f || (rest == 0.5f && (whole & 1))) ++whole;
    return static_cast<uint16_t>(sign | whole);
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
inline float to_tf32_bits(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

}  // namespace ptx
