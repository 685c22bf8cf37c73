// AVX2: runs of neighbouring pixels, and of every second pixel, by whole vectors.
#include "cpu/microkernels/copy.h"

#include <immintrin.h>

namespace bap_kernels::micro {
namespace {

inline void copy_neighbours(const float* src, int64_t count, float* dst) {
  if (count >= 8) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(dst + i, _mm256_loadu_ps(src + i));
    // The last vector overlaps what is already there.
    if (i < count) _mm256_storeu_ps(dst + count - 8, _mm256_loadu_ps(src + count - 8));
  } else if (count >= 4) {
    const __m128 first = _mm_loadu_ps(src), last = _mm_loadu_ps(src + count - 4);
    _mm_storeu_ps(dst, first);
    _mm_storeu_ps(dst + count - 4, last);
  } else {
    for (int64_t i = 0; i < count; ++i) dst[i] = src[i];
  }
}

inline void copy_every_second(const float* src, int64_t count, float* dst) {
  int64_t i = 0;
  // Two vectors reach one float beyond the eighth pixel, so a ninth must exist.
  for (; i + 8 < count; i += 8) {
    const __m256 low = _mm256_loadu_ps(src + 2 * i), high = _mm256_loadu_ps(src + 2 * i + 8);
    const __m256 even = _mm256_shuffle_ps(low, high, 0x88);  // 0 2 8 10 | 4 6 12 14
    _mm256_storeu_ps(dst + i, _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8)));
  }
  for (; i < count; ++i) dst[i] = src[2 * i];
}

}  // namespace

void copy_runs_avx2(const Copy* copies, int64_t count, const float* plane, int64_t step, float* row) {
  for (const Copy* copy = copies; copy != copies + count; ++copy) {
    float* dst = row + copy->place;
    if (copy->source < 0) {
      for (int64_t i = 0; i < copy->count; ++i) dst[i] = 0.f;
    } else if (step == 1) {
      copy_neighbours(plane + copy->source, copy->count, dst);
    } else if (step == 2) {
      copy_every_second(plane + copy->source, copy->count, dst);
    } else {
      for (int64_t i = 0; i < copy->count; ++i) dst[i] = plane[copy->source + i * step];
    }
  }
}

}  // namespace bap_kernels::micro
