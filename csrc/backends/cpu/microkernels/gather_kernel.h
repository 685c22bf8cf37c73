// The channel gathers with AVX-512, written once for both sizes of element. Included by one source file for each,
// inside that file's own anonymous namespace.

struct Floats {
  using element_t = float;
  static constexpr int kLanes = 16;
  using Mask = __mmask16;
  static __m512i load(const float* p) { return _mm512_loadu_si512(p); }
  static __m512i load(const float* p, Mask mask) { return _mm512_maskz_loadu_epi32(mask, p); }
  static __m512i moved(__m512i to, Mask mask, __m512i places, __m512i from) {
    return _mm512_mask_permutexvar_epi32(to, mask, places, from);
  }
  static void store(float* p, __m512i v) { _mm512_storeu_si512(p, v); }
  static void store(float* p, Mask mask, __m512i v) { _mm512_mask_storeu_epi32(p, mask, v); }
  static __m512i with_prologue(const ChannelGather& t, int64_t i, Mask lanes, __m512i v) {
    __m512 y = _mm512_castsi512_ps(v);
    if (t.scale) y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(lanes, t.scale + i));
    if (t.shift) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(lanes, t.shift + i));
    if (t.relu) y = _mm512_max_ps(_mm512_setzero_ps(), y);  // NaN, the second operand, stays
    return _mm512_castps_si512(y);
  }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using element_t = uint16_t;
  static constexpr int kLanes = 32;
  using Mask = __mmask32;
  static __m512i load(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static __m512i load(const uint16_t* p, Mask mask) { return _mm512_maskz_loadu_epi16(mask, p); }
  static __m512i moved(__m512i to, Mask mask, __m512i places, __m512i from) {
    return _mm512_mask_permutexvar_epi16(to, mask, places, from);
  }
  static void store(uint16_t* p, __m512i v) { _mm512_storeu_si512(p, v); }
  static void store(uint16_t* p, Mask mask, __m512i v) { _mm512_mask_storeu_epi16(p, mask, v); }
  static __m512i with_prologue(const ChannelGather& t, int64_t i, Mask lanes, __m512i v) {
    const auto half = [&](__m256i part, int64_t first, __mmask16 mask) {
      const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16);
      return _mm512_castsi512_ps(Floats::with_prologue(t, first, mask, bits));
    };
    const __m512 low = half(_mm512_castsi512_si256(v), i, static_cast<__mmask16>(lanes));
    const __m512 high = half(_mm512_extracti64x4_epi64(v, 1), i + 16, static_cast<__mmask16>(lanes >> 16));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
};
#endif

// One vector of listed channels of all pixels, from kSteps loads whose permutations stay in registers; 0: any number of
// loads, whose permutations are read again for each pixel.
template <class S, int kSteps, bool kPrologue>
void gather_vector(const ChannelGather& t, const GatherStep* steps, int64_t first) {
  using Mask = typename S::Mask;
  constexpr int kHeld = kSteps > 0 ? kSteps : 1;
  const int count = steps->steps;
  const auto all = static_cast<Mask>(~Mask{0});
  const Mask stored = static_cast<Mask>(steps->stored);
  const bool short_pixel = t.channels < S::kLanes;
  const auto* in = static_cast<const typename S::element_t*>(t.in);
  auto* out = static_cast<typename S::element_t*>(t.out) + first;
  __m512i places[kHeld];
  Mask lanes[kHeld];
  int64_t begin[kHeld];
#pragma GCC unroll 4
  for (int s = 0; s < kHeld; ++s) {
    places[s] = _mm512_load_si512(steps[s].places);
    lanes[s] = static_cast<Mask>(steps[s].lanes);
    begin[s] = steps[s].begin;
  }
  const Mask listed = t.listed - first < S::kLanes ? static_cast<Mask>((Mask{1} << (t.listed - first)) - 1) : all;
  const Mask inside = short_pixel ? static_cast<Mask>((Mask{1} << t.channels) - 1) : all;
  for (int64_t p = 0; p < t.pixels; ++p, in += t.in_step, out += t.out_step) {
    __m512i v = _mm512_setzero_si512();
    if (short_pixel) {
      v = S::moved(v, lanes[0], places[0], S::load(in + begin[0], inside));
    } else {
#pragma GCC unroll 4
      for (int s = 0; s < kHeld; ++s) v = S::moved(v, lanes[s], places[s], S::load(in + begin[s]));
      if constexpr (kSteps == 0) {
        for (int s = 1; s < count; ++s) {
          v = S::moved(v, static_cast<Mask>(steps[s].lanes), _mm512_load_si512(steps[s].places),
                       S::load(in + steps[s].begin));
        }
      }
    }
    if constexpr (kPrologue) v = S::with_prologue(t, first, listed, v);
    stored == all ? S::store(out, v) : S::store(out, stored, v);
  }
}

template <class S, bool kPrologue>
void gather_vectors(const ChannelGather& t) {
  const GatherStep* step = t.steps;
  for (int64_t first = 0; first < t.listed; first += S::kLanes, step += step->steps) {
    switch (step->steps) {
      case 1:
        gather_vector<S, 1, kPrologue>(t, step, first);
        break;
      case 2:
        gather_vector<S, 2, kPrologue>(t, step, first);
        break;
      case 3:
        gather_vector<S, 3, kPrologue>(t, step, first);
        break;
      case 4:
        gather_vector<S, 4, kPrologue>(t, step, first);
        break;
      default:
        gather_vector<S, 0, kPrologue>(t, step, first);
    }
  }
}

template <class S>
inline void gather_channels(const ChannelGather& t) {
  t.has_prologue ? gather_vectors<S, true>(t) : gather_vectors<S, false>(t);
}
