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

// A lane's bits: a bfloat16 is the upper half of its float.
inline void put(float* lane, uint32_t lower, uint32_t upper) {
  const uint32_t bits = upper << 16 | lower;
  __builtin_memcpy(lane, &bits, 4);
}

inline void widen(const uint16_t* src, int64_t count, int64_t step, float* dst) {
  int64_t i = 0;
  if (step == 1) {
    for (; i + 8 <= count; i += 8) {
      const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i)));
      _mm256_storeu_ps(dst + i, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
    }
  }
  for (; i < count; ++i) put(dst + i, 0, src[i * step]);
}

inline void pair(const uint16_t* first, const uint16_t* second, int64_t count, int64_t step, float* dst) {
  int64_t i = 0;
  if (step == 1 && second) {
    for (; i + 8 <= count; i += 8) {
      const __m256i lower = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first + i)));
      const __m256i upper = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(second + i)));
      const __m256i bits = _mm256_or_si256(lower, _mm256_slli_epi32(upper, 16));
      _mm256_storeu_ps(dst + i, _mm256_castsi256_ps(bits));
    }
  }
  for (; i < count; ++i) put(dst + i, first[i * step], second ? second[i * step] : 0);
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

void widen_runs_avx2(const Copy* copies, int64_t count, const uint16_t* plane, int64_t step, float* row) {
  for (const Copy* copy = copies; copy != copies + count; ++copy) {
    float* dst = row + copy->place;
    if (copy->source < 0) {
      for (int64_t i = 0; i < copy->count; ++i) dst[i] = 0.f;
    } else {
      widen(plane + copy->source, copy->count, step, dst);
    }
  }
}

void pair_runs_avx2(const Copy* copies, int64_t count, const uint16_t* first, const uint16_t* second, int64_t step,
                    float* row) {
  for (const Copy* copy = copies; copy != copies + count; ++copy) {
    float* dst = row + copy->place;
    if (copy->source < 0) {
      for (int64_t i = 0; i < copy->count; ++i) dst[i] = 0.f;
    } else {
      pair(first + copy->source, second ? second + copy->source : nullptr, copy->count, step, dst);
    }
  }
}

}  // namespace bap_kernels::micro
