// The channel gather with AVX2, of float pixels. Whole vectors are loaded: masked loads take several times as long on
// Zen 3.
#include <immintrin.h>

#include "backends/cpu/microkernels/gather.h"

namespace bap_kernels::micro {
namespace {

constexpr int kLanes = 8;

// All bits of the lanes that a mask names.
inline __m256i lanes_of(uint32_t mask) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bits), bits);
}

inline __m256i places_of(const GatherStep& step) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(step.places));
}

// One vector of listed channels of all pixels, from kSteps loads whose permutations stay in registers; 0: any number of
// loads, whose permutations are read again for each pixel.
template <int kSteps>
void gather_vector(const ChannelGather& t, const GatherStep* steps, int64_t first) {
  constexpr int kHeld = kSteps > 0 ? kSteps : 1;
  __m256i places[kHeld];
  __m256 lanes[kHeld];
  int64_t begin[kHeld];
  for (int s = 0; s < kHeld; ++s) {
    places[s] = places_of(steps[s]);
    lanes[s] = _mm256_castsi256_ps(lanes_of(steps[s].lanes));
    begin[s] = steps[s].begin;
  }
  const int64_t stored = t.listed - first < kLanes ? t.listed - first : kLanes;
  const auto* in = static_cast<const float*>(t.in);
  auto* out = static_cast<float*>(t.out) + first;
  for (int64_t p = 0; p < t.pixels; ++p, in += t.in_step, out += t.out_step) {
    __m256 v = _mm256_permutevar8x32_ps(_mm256_loadu_ps(in + begin[0]), places[0]);
#pragma GCC unroll 3
    for (int s = 1; s < kHeld; ++s) {
      v = _mm256_blendv_ps(v, _mm256_permutevar8x32_ps(_mm256_loadu_ps(in + begin[s]), places[s]), lanes[s]);
    }
    for (int s = 1; kSteps == 0 && s < steps->steps; ++s) {
      const __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps(in + steps[s].begin), places_of(steps[s]));
      v = _mm256_blendv_ps(v, moved, _mm256_castsi256_ps(lanes_of(steps[s].lanes)));
    }
    if (stored == kLanes) {
      _mm256_storeu_ps(out, v);
      continue;
    }
    alignas(32) float part[kLanes];
    _mm256_store_ps(part, v);
    for (int64_t i = 0; i < stored; ++i) out[i] = part[i];
  }
}

}  // namespace

void gather_floats_avx2(const ChannelGather& t) {
  constexpr decltype(&gather_vector<0>) kFewLoads[] = {gather_vector<0>, gather_vector<1>, gather_vector<2>,
                                                       gather_vector<3>};
  const GatherStep* step = t.steps;
  for (int64_t first = 0; first < t.listed; first += kLanes, step += step->steps) {
    kFewLoads[step->steps <= 3 ? step->steps : 0](t, step, first);
  }
}

}  // namespace bap_kernels::micro
