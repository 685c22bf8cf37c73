// AVX2: a group of lanes at a time, by masked loads, which touch nothing outside their masks.
#include "backends/cpu/microkernels/pack_row.h"

#include <immintrin.h>

namespace bap_kernels::micro {
namespace {

// All bits of a lane where the lane's bit of `mask` is set. Lanes with no bit of their own stay clear.
inline __m256i lanes_of(int32_t mask, __m256i bits) {
  return _mm256_cmpgt_epi32(_mm256_and_si256(_mm256_set1_epi32(mask), bits), _mm256_setzero_si256());
}

inline __m256i all_lanes(int32_t mask) { return lanes_of(mask, _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128)); }

inline __m256 load(const float* src, int32_t mask) {
  return mask == kAllLanes ? _mm256_loadu_ps(src) : _mm256_maskload_ps(src, all_lanes(mask));
}

inline __m256 load_every_second(const float* src, int32_t mask) {
  if (mask == kAllLanes) {
    // The last of them is element 14: two vectors side by side would reach one further.
    const __m256 low = _mm256_loadu_ps(src), high = _mm256_loadu_ps(src + 7);
    const __m256 even = _mm256_shuffle_ps(low, high, 0xd8);  // 0 2 8 10 | 4 6 12 14
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8));
  }
  const __m256 low = _mm256_maskload_ps(src, lanes_of(mask, _mm256_setr_epi32(1, 0, 2, 0, 4, 0, 8, 0)));
  const __m256 high = _mm256_maskload_ps(src + 8, lanes_of(mask, _mm256_setr_epi32(16, 0, 32, 0, 64, 0, 128, 0)));
  const __m256 even = _mm256_shuffle_ps(low, high, 0x88);  // 0 2 8 10 | 4 6 12 14
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8));
}

inline __m256 load_apart(const float* src, int32_t mask, int64_t step) {
  alignas(32) float lanes[kRowLanes] = {};
  for (int64_t l = 0; l < kRowLanes; ++l) {
    if (mask >> l & 1) lanes[l] = src[l * step];
  }
  return _mm256_load_ps(lanes);
}

// As 32-bit lanes, the upper halves clear.
inline __m256i load_bits(const uint16_t* src, int32_t mask, int64_t step) {
  if (step == 1 && mask == kAllLanes) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
  }
  alignas(32) uint32_t lanes[kRowLanes] = {};
  for (int64_t l = 0; l < kRowLanes; ++l) {
    if (mask >> l & 1) lanes[l] = src[l * step];
  }
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes));
}

// A bfloat16 is the upper half of its float.
inline __m256 widened(__m256i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)); }

// A NaN stays one.
inline __m256 applied(const RowPrologue& f, __m256 v, int32_t mask) {
  v = _mm256_fmadd_ps(v, _mm256_set1_ps(f.scale), _mm256_set1_ps(f.shift));
  if (f.relu) v = _mm256_max_ps(_mm256_setzero_ps(), v);
  return _mm256_and_ps(v, _mm256_castsi256_ps(all_lanes(mask)));
}

// The upper halves, rounded to nearest even, in the lower ones.
inline __m256i rounded(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i number = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(number, _mm256_set1_epi32(0x7fc0), is_nan);
}

template <class Load>
inline void pack(const RowPart* parts, int64_t count, int64_t step, const RowPrologue* prologue, float* row,
                 const Load& load) {
  __m256 lanes = _mm256_setzero_ps();
  for (const RowPart* part = parts; part != parts + count; ++part) {
    if (part->mask == kAllLanes) {
      for (int32_t g = 0; g < part->groups; ++g, row += kRowLanes) {
        const __m256 v = load(part->source + g * kRowLanes * step, kAllLanes);
        _mm256_storeu_ps(row, prologue ? applied(*prologue, v, kAllLanes) : v);
      }
      continue;
    }
    __m256 v = load(part->source, part->mask);
    if (prologue) v = applied(*prologue, v, part->mask);
    lanes = _mm256_or_ps(lanes, v);
    if (part->groups == 0) continue;
    _mm256_storeu_ps(row, lanes);
    row += kRowLanes;
    lanes = _mm256_setzero_ps();
  }
}

}  // namespace

void pack_row(const RowPart* parts, int64_t count, const float* plane, int64_t step, const RowPrologue* prologue,
              float* row) {
  if (step == 1) {
    pack(parts, count, step, prologue, row, [=](int64_t source, int32_t mask) { return load(plane + source, mask); });
  } else if (step == 2) {
    pack(parts, count, step, prologue, row,
         [=](int64_t source, int32_t mask) { return load_every_second(plane + source, mask); });
  } else {
    pack(parts, count, step, prologue, row,
         [=](int64_t source, int32_t mask) { return load_apart(plane + source, mask, step); });
  }
}

void pack_row(const RowPart* parts, int64_t count, const uint16_t* plane, int64_t step, const RowPrologue* prologue,
              float* row) {
  pack(parts, count, step, prologue, row,
       [=](int64_t source, int32_t mask) { return widened(load_bits(plane + source, mask, step)); });
}

void pack_pairs(const RowPart* parts, int64_t count, const uint16_t* first, const uint16_t* second, int64_t step,
                const RowPrologue* prologues, float* row) {
  const auto half = [=](const uint16_t* plane, const RowPrologue* prologue, int64_t source, int32_t mask) {
    const __m256i bits = load_bits(plane + source, mask, step);
    return prologue ? rounded(applied(*prologue, widened(bits), mask)) : bits;
  };
  pack(parts, count, step, nullptr, row, [=](int64_t source, int32_t mask) {
    __m256i lanes = half(first, prologues, source, mask);
    if (second) {
      const __m256i upper = half(second, prologues ? prologues + 1 : nullptr, source, mask);
      lanes = _mm256_or_si256(lanes, _mm256_slli_epi32(upper, 16));
    }
    return _mm256_castsi256_ps(lanes);
  });
}

}  // namespace bap_kernels::micro
