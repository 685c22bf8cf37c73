// Conversions of elements.
#include "check.h"

#include <cmath>

#include "backends/cuda/kernels/elements.h"

namespace bap_kernels {
namespace {

void conversions() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto word = static_cast<uint16_t>(bits);
    const float half = to_float(HalfWord{word}), brain = to_float(BFloat16Word{word});
    const int exponent = (word >> 10) & 31, mantissa = word & 1023, sign = word & 0x8000 ? -1 : 1;
    if (exponent < 31) {
      const double wanted = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
      require(half == static_cast<float>(sign * wanted), "a half differs");
      require(from_float<HalfWord>(half).bits == word, "a half does not come back");
    } else {
      require(mantissa ? std::isnan(half) : half == sign * INFINITY, "a special half differs");
    }
    if (!std::isnan(brain)) require(from_float<BFloat16Word>(brain).bits == word, "a bfloat16 does not come back");
    if (exponent < 30 && sign > 0) {
      // Halfway to the next one goes to the even one, a little more or less to the nearer one.
      const float next = to_float(HalfWord{static_cast<uint16_t>(word + 1)}), middle = (half + next) / 2;
      const auto even = static_cast<uint16_t>(word + word % 2);
      require(from_float<HalfWord>(middle).bits == even, "a tie of halves is not even");
      require(from_float<HalfWord>(std::nextafter(middle, 0.0f)).bits == word, "a half is not the nearest below");
      require(from_float<HalfWord>(std::nextafter(middle, 1e9f)).bits == word + 1, "a half is not the nearest above");
    }
  }
  require(from_float<HalfWord>(65520.0f).bits == 0x7c00 && from_float<HalfWord>(65519.0f).bits == 0x7bff,
          "halves do not end where they should");
  require(std::isnan(to_float(from_float<HalfWord>(NAN))) && std::isnan(to_float(from_float<BFloat16Word>(NAN))),
          "NaN is lost");
  for (float value : {1.0f, 3.14159f, -2.71828f, 1e-20f, 1e20f, 0.0f}) {
    const uint32_t bits = bits_of(value), high = to_tf32(bits);
    require((high & 0x1fff) == 0, "TF32 has more bits than it should");
    require(std::abs(float_of(high) - value) <= std::abs(value) * 0x1p-11f, "TF32 is not the nearest");
  }
  require(to_tf32(bits_of(INFINITY)) == bits_of(INFINITY), "infinity is lost");
}

}  // namespace

Checks number_checks() { return {{"conversions", conversions}}; }

}  // namespace bap_kernels
