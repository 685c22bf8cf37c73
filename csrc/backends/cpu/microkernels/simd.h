// Vectors of every width under one name: loads, stores, parts of vectors, and bfloat16.
// Included by one source file per instruction set, inside that file's own anonymous namespace, before the kernels.

// Spelt out for each width: where a vector's size depends on a template argument, GCC takes its type for a scalar.
template <int kLanes>
struct Vectors;

template <>
struct Vectors<4> {
  typedef float Vec __attribute__((vector_size(16)));
  typedef float LooseVec __attribute__((vector_size(16), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  typedef uint16_t Halves __attribute__((vector_size(8)));
  typedef uint16_t LooseHalves __attribute__((vector_size(8), aligned(2), may_alias));
};

template <>
struct Vectors<8> {
  typedef float Vec __attribute__((vector_size(32)));
  typedef float LooseVec __attribute__((vector_size(32), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(32)));
  typedef uint16_t Halves __attribute__((vector_size(16)));
  typedef uint16_t LooseHalves __attribute__((vector_size(16), aligned(2), may_alias));
};

template <>
struct Vectors<16> {
  typedef float Vec __attribute__((vector_size(64)));
  typedef float LooseVec __attribute__((vector_size(64), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(64)));
  typedef uint16_t Halves __attribute__((vector_size(32)));
  typedef uint16_t LooseHalves __attribute__((vector_size(32), aligned(2), may_alias));
};

template <int kLanes, bool kPairs>
struct Simd : Vectors<kLanes> {
  using typename Vectors<kLanes>::Vec;
  using typename Vectors<kLanes>::LooseVec;
  using typename Vectors<kLanes>::Bits;
  using typename Vectors<kLanes>::Halves;
  using typename Vectors<kLanes>::LooseHalves;

  static inline __attribute__((always_inline)) Vec load(const float* p) {
    return *reinterpret_cast<const LooseVec*>(p);
  }
  static inline __attribute__((always_inline)) void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
  static inline __attribute__((always_inline)) Halves load(const uint16_t* p) {
    return *reinterpret_cast<const LooseHalves*>(p);
  }
  static inline __attribute__((always_inline)) void store(uint16_t* p, Halves v) {
    *reinterpret_cast<LooseHalves*>(p) = v;
  }

  static inline __attribute__((always_inline)) Vec from_bfloat16(Halves v) {
    return (Vec)(__builtin_convertvector(v, Bits) << 16);
  }
  // Round to nearest even; NaN stays NaN. AVX512_BF16 takes denormal numbers for zero, as its products do.
  static inline __attribute__((always_inline)) Halves to_bfloat16(Vec v) {
#if defined(__AVX512BF16__)
    if constexpr (kLanes == 16) return (Halves)_mm512_cvtneps_pbh((__m512)v);
#endif
    const Bits bits = (Bits)v;
    const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return __builtin_convertvector((v == v ? rounded : bits | 0x400000u) >> 16, Halves);
  }

  // x - 0 is x for every x, so this is a plain broadcast.
  static inline __attribute__((always_inline)) Vec broadcast(float s) { return s - Vec{}; }

  static inline __attribute__((always_inline)) void add_product(Vec& acc, Vec a, Vec b) {
    if constexpr (!kPairs) {
      acc += a * b;
    } else {
#if defined(__AVX512BF16__)
      if constexpr (kLanes == 16) {
        acc = (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
        return;
      }
#endif
      const Bits ua = (Bits)a, ub = (Bits)b;
      acc += (Vec)(ua << 16) * (Vec)(ub << 16);
      acc += (Vec)(ua & 0xffff0000u) * (Vec)(ub & 0xffff0000u);
    }
  }
};

// The first `count` < kLanes elements at p, zeros behind them, and their counterpart; nothing past them is touched.
template <int kLanes, class element_t>
inline auto load_part(const element_t* p, int count) {
  using S = Simd<kLanes, false>;
#if defined(__AVX512BW__)
  if constexpr (kLanes == 16) {
    const auto mask = static_cast<uint16_t>((1u << count) - 1);
    if constexpr (sizeof(element_t) == 4) {
      return (typename S::Vec)_mm512_maskz_loadu_ps(mask, p);
    } else {
      return (typename S::Halves)_mm256_maskz_loadu_epi16(mask, p);
    }
  }
#endif
#if defined(__AVX2__)
  if constexpr (kLanes == 8 && sizeof(element_t) == 4) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (typename S::Vec)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes));
  }
#endif
  alignas(64) element_t part[kLanes] = {};
  for (int i = 0; i < count; ++i) part[i] = p[i];
  return S::load(part);
}

// Whether part of a vector is loaded and stored as fast as all of it.
#if defined(__AVX512BW__)
template <int kLanes>
constexpr bool kMasks = kLanes == 16;
#else
template <int kLanes>
constexpr bool kMasks = false;
#endif

template <int kLanes, class element_t, class vector_t>
inline void store_part(element_t* p, vector_t v, int count) {
#if defined(__AVX512BW__)
  if constexpr (kLanes == 16) {
    const auto mask = static_cast<uint16_t>(count < kLanes ? (1u << count) - 1 : 0xffff);
    if constexpr (sizeof(element_t) == 4) {
      _mm512_mask_storeu_ps(p, mask, (__m512)v);
    } else {
      _mm256_mask_storeu_epi16(p, mask, (__m256i)v);
    }
    return;
  }
#endif
  alignas(64) element_t part[kLanes];
  Simd<kLanes, false>::store(part, v);
  for (int i = 0; i < count; ++i) p[i] = part[i];
}

// The first `count` of two vectors' results at p, rounded to bfloat16.
template <int kLanes, class Vec>
inline __attribute__((always_inline)) void store_bfloat16(uint16_t* p, Vec first, Vec second, int count) {
  using S = Simd<kLanes, false>;
#if defined(__AVX512BF16__)
  if constexpr (kLanes == 16) {
    const auto halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    if (count == 2 * kLanes) {
      _mm512_storeu_si512(p, halves);
    } else {
      _mm512_mask_storeu_epi16(p, (1u << count) - 1, halves);
    }
    return;
  }
#endif
  if (count == 2 * kLanes) {
    S::store(p, S::to_bfloat16(first));
    S::store(p + kLanes, S::to_bfloat16(second));
  } else if (count <= kLanes) {
    store_part<kLanes>(p, S::to_bfloat16(first), count);
  } else {
    S::store(p, S::to_bfloat16(first));
    store_part<kLanes>(p + kLanes, S::to_bfloat16(second), count - kLanes);
  }
}

// A ReLU with a smallest and a largest result. NaN stays. Two operations, where `least` is not a constant zero: that
// would be compared and masked.
template <class Vec>
inline __attribute__((always_inline)) Vec clamped(Vec y, Vec least, Vec most) {
  y = y < least ? least : y;
  return y > most ? most : y;
}
