// Stores and sums of computed input gradients, in loops that compilers vectorise.
// Included by one source file per architecture, inside namespace bap_kernels::micro; see gradient_rows.h.

namespace {

inline float to_float(float v) { return v; }
inline float to_float(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

inline void put(float* p, uint32_t bits) { __builtin_memcpy(p, &bits, 4); }
// Round to nearest even; NaN stays NaN.
inline void put(uint16_t* p, uint32_t bits) {
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  *p = static_cast<uint16_t>((nan ? bits | 0x400000u : bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline uint32_t bits_of(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  return bits;
}

template <class T>
void pixel(const float* __restrict part, const T* __restrict x, T* __restrict dx, const uint32_t* __restrict keep,
           float* __restrict dots, int64_t n) {
  if (dots) {
    for (int64_t c = 0; c < n; ++c) dots[c] += part[c] * to_float(x[c]);
  }
  if (dx && keep) {
    for (int64_t c = 0; c < n; ++c) put(dx + c, bits_of(part[c]) & keep[c]);
  } else if (dx) {
    for (int64_t c = 0; c < n; ++c) put(dx + c, bits_of(part[c]));
  }
}

template <class T>
float run(const float* __restrict part, const T* __restrict x, int64_t x_step, T* __restrict dx, int64_t dx_step,
          int64_t n) {
  if (dx && dx_step == 1) {
    for (int64_t i = 0; i < n; ++i) put(dx + i, bits_of(part[i]));
  } else if (dx) {
    for (int64_t i = 0; i < n; ++i) put(dx + i * dx_step, bits_of(part[i]));
  }
  if (!x) return 0.f;
  constexpr int kLanes = 32;
  float sums[kLanes] = {};
  int64_t i = 0;
  if (x_step == 1) {
    for (; i + kLanes <= n; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) sums[l] += part[i + l] * to_float(x[i + l]);
    }
  }
  float total = 0.f;
  for (; i < n; ++i) total += part[i] * to_float(x[i * x_step]);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  }
  return total + sums[0];
}

template <class T>
float pairs(const float* even, const float* odd, const T* x, T* dx, int64_t n, int64_t n_odd) {
  constexpr int64_t kMost = 64;
  float total = 0.f;
  for (int64_t first = 0; first < n; first += kMost) {
    const int64_t count = n - first < kMost ? n - first : kMost;
    const int64_t odd_count = n_odd - first < count ? n_odd - first : count;
    float row[2 * kMost];
    int64_t i = 0;
#if defined(__AVX2__)
    for (; i + 8 <= odd_count; i += 8) {
      const __m256 a = _mm256_loadu_ps(even + first + i), b = _mm256_loadu_ps(odd + first + i);
      const __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
      _mm256_storeu_ps(row + 2 * i, _mm256_permute2f128_ps(low, high, 0x20));
      _mm256_storeu_ps(row + 2 * i + 8, _mm256_permute2f128_ps(low, high, 0x31));
    }
#endif
    for (; i < count; ++i) {
      row[2 * i] = even[first + i];
      if (i < odd_count) row[2 * i + 1] = odd[first + i];
    }
    total += run(row, x ? x + 2 * first : nullptr, 1, dx ? dx + 2 * first : nullptr, 1, count + odd_count);
  }
  return total;
}

}  // namespace

void gradient_pixel(const float* part, const float* x, float* dx, const uint32_t* keep, float* dots, int64_t n) {
  pixel(part, x, dx, keep, dots, n);
}

void gradient_pixel(const float* part, const uint16_t* x, uint16_t* dx, const uint32_t* keep, float* dots, int64_t n) {
  pixel(part, x, dx, keep, dots, n);
}

float gradient_run(const float* part, const float* x, int64_t x_step, float* dx, int64_t dx_step, int64_t n) {
  return run(part, x, x_step, dx, dx_step, n);
}

float gradient_run(const float* part, const uint16_t* x, int64_t x_step, uint16_t* dx, int64_t dx_step, int64_t n) {
  return run(part, x, x_step, dx, dx_step, n);
}

float gradient_pairs(const float* even, const float* odd, const float* x, float* dx, int64_t n, int64_t n_odd) {
  return pairs(even, odd, x, dx, n, n_odd);
}

float gradient_pairs(const float* even, const float* odd, const uint16_t* x, uint16_t* dx, int64_t n, int64_t n_odd) {
  return pairs(even, odd, x, dx, n, n_odd);
}
