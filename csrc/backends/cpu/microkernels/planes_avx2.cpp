// Transposition of 8 x 8 values in registers. See planes.h.
#include "backends/cpu/microkernels/planes.h"

#include <immintrin.h>

namespace bap_kernels::micro {
namespace {

inline __attribute__((always_inline)) void transpose(__m256* v) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// 8 pixels of one channel, or the last few of them.
inline __m256 load(const float* p, int64_t count) {
  return count >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first_lanes(count));
}

inline void store(float* p, __m256 v, int64_t count) {
  count >= 8 ? _mm256_storeu_ps(p, v) : _mm256_maskstore_ps(p, first_lanes(count), v);
}

}  // namespace

void planes_to_pixels(const float* const* planes, int64_t channels, int64_t count, float* pixels, int64_t step) {
  for (int64_t c = 0; c < channels; c += 8) {
    for (int64_t p = 0; p < count; p += 8) {
      __m256 v[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        v[i] = c + i < channels ? load(planes[c + i] + p, count - p) : _mm256_setzero_ps();
      }
      transpose(v);
      float* out = pixels + p * step + c;
      if (count - p >= 8) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) _mm256_storeu_ps(out + i * step, v[i]);
      } else {
        for (int i = 0; i < count - p; ++i) _mm256_storeu_ps(out + i * step, v[i]);
      }
    }
  }
}

void pixels_to_planes(const float* pixels, int64_t step, int64_t channels, int64_t count, float* planes,
                      int64_t plane_step, const float* residual, bool relu, float out_max) {
  const __m256 zero = _mm256_setzero_ps(), most = _mm256_set1_ps(out_max);
  for (int64_t c = 0; c < channels; c += 8) {
    const int64_t rows = channels - c < 8 ? channels - c : 8;
    for (int64_t p = 0; p < count; p += 8) {
      const int64_t left = count - p;
      const float* in = pixels + p * step + c;
      __m256 v[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) v[i] = i < left ? _mm256_loadu_ps(in + i * step) : zero;
      transpose(v);
      float* out = planes + c * plane_step + p;
      const float* other = residual != nullptr ? residual + c * plane_step + p : nullptr;
      const auto finish = [&](int i) __attribute__((always_inline)) {
        if (other != nullptr) v[i] = _mm256_add_ps(v[i], load(other + i * plane_step, left));
        // Not max and min: NaN stays.
        if (relu) {
          v[i] = _mm256_blendv_ps(v[i], zero, _mm256_cmp_ps(v[i], zero, _CMP_LT_OQ));
          v[i] = _mm256_blendv_ps(v[i], most, _mm256_cmp_ps(v[i], most, _CMP_GT_OQ));
        }
        store(out + i * plane_step, v[i], left);
      };
      if (rows == 8) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) finish(i);
      } else {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          if (i < rows) finish(i);
        }
      }
    }
  }
}

}  // namespace bap_kernels::micro
