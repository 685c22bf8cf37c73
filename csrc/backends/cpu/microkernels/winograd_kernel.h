// Winograd's minimal filtering for 3 x 3 convolutions (Lavin and Gray, arXiv 1509.09308), written once for every
// vector width; lanes are channels throughout.
//   Y = A^T [ sum over channels of (G w G^T) * (B^T x B) ] A      with * element by element
// Included by one source file per instruction set behind winograd_transforms.h, inside that file's own anonymous
// namespace.
// Accumulates in fp32, channels in order: a result depends on the call alone, never on its tile's place in a block.

template <int kLanes, int kPoints>
void winograd_input(const WinogradInput& t) {
  using S = Simd<kLanes, false>;
  using Vec = typename S::Vec;
  float* block = t.values;
  for (int64_t channel = 0; channel < t.channels; channel += kLanes, block += t.channel_step) {
    const float* const* pixel = t.pixels;
    float* values = block;
    for (int64_t tile = 0; tile < t.tiles; ++tile, pixel += kPoints * kPoints, values += kLanes) {
      Vec columns[kPoints][kPoints];  // [column][row]
#pragma GCC unroll 6
      for (int j = 0; j < kPoints; ++j) {
        Vec d[kPoints];
#pragma GCC unroll 6
        for (int i = 0; i < kPoints; ++i) d[i] = S::load(pixel[i * kPoints + j] + channel);
        transform_pixels<kPoints>(d);
#pragma GCC unroll 6
        for (int i = 0; i < kPoints; ++i) columns[j][i] = d[i];
      }
#pragma GCC unroll 6
      for (int i = 0; i < kPoints; ++i) {
        Vec d[kPoints];
#pragma GCC unroll 6
        for (int j = 0; j < kPoints; ++j) d[j] = columns[j][i];
        transform_pixels<kPoints>(d);
#pragma GCC unroll 6
        for (int j = 0; j < kPoints; ++j) S::store(values + (i * kPoints + j) * t.point_step, d[j]);
      }
    }
  }
}

template <int kLanes, int kPoints>
void winograd_gradient(const WinogradInput& t) {
  using S = Simd<kLanes, false>;
  using Vec = typename S::Vec;
  constexpr int kSize = kPoints - 2;
  float* block = t.values;
  for (int64_t channel = 0; channel < t.channels; channel += kLanes, block += t.channel_step) {
    const float* const* pixel = t.pixels;
    float* values = block;
    for (int64_t tile = 0; tile < t.tiles; ++tile, pixel += kSize * kSize, values += kLanes) {
      Vec columns[kSize][kPoints];  // [column][row]
#pragma GCC unroll 4
      for (int j = 0; j < kSize; ++j) {
        Vec g[kSize];
#pragma GCC unroll 4
        for (int i = 0; i < kSize; ++i) g[i] = S::load(pixel[i * kSize + j] + channel);
        transform_gradients<kPoints>(g, columns[j]);
      }
#pragma GCC unroll 6
      for (int i = 0; i < kPoints; ++i) {
        Vec g[kSize], m[kPoints];
#pragma GCC unroll 4
        for (int j = 0; j < kSize; ++j) g[j] = columns[j][i];
        transform_gradients<kPoints>(g, m);
#pragma GCC unroll 6
        for (int j = 0; j < kPoints; ++j) S::store(values + (i * kPoints + j) * t.point_step, m[j]);
      }
    }
  }
}

template <int kLanes, int kRows, int kVectors>
void winograd_outer(const WinogradOuter& t) {
  using S = Simd<kLanes, false>;
  using Vec = typename S::Vec;
  Vec acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 6
    for (int v = 0; v < kVectors; ++v) acc[r][v] = Vec{};
  }
  const float* x = t.values;
  const float* g = t.gradients;
  for (const float* const end = x + t.tiles * kLanes; x != end; x += kLanes, g += kLanes) {
    Vec b[kVectors];
#pragma GCC unroll 6
    for (int v = 0; v < kVectors; ++v) b[v] = S::load(g + v * t.gradient_step);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec a = S::broadcast(x[r]);
#pragma GCC unroll 6
      for (int v = 0; v < kVectors; ++v) acc[r][v] += a * b[v];
    }
  }
  // What is there is added last: each block's sum is short, and its rounding errors are.
  float* sums = t.sums;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 6
    for (int v = 0; v < kVectors; ++v, sums += kLanes) S::store(sums, t.add ? S::load(sums) + acc[r][v] : acc[r][v]);
  }
}

template <int kLanes, int kPoints>
void winograd_taps(const WinogradTaps& t) {
  using S = Simd<kLanes, false>;
  using Vec = typename S::Vec;
  Vec columns[kPoints][3];  // [column][row]
#pragma GCC unroll 6
  for (int j = 0; j < kPoints; ++j) {
    Vec m[kPoints];
#pragma GCC unroll 6
    for (int i = 0; i < kPoints; ++i) m[i] = S::load(t.sums + (i * kPoints + j) * t.point_step);
    transform_taps<kPoints>(m, columns[j]);
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    Vec m[kPoints], w[3];
#pragma GCC unroll 6
    for (int j = 0; j < kPoints; ++j) m[j] = columns[j][i];
    transform_taps<kPoints>(m, w);
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) S::store(t.taps + (i * 3 + j) * kLanes, w[j]);
  }
}

template <int kLanes, int kRows, int kVectors>
void winograd_product(const WinogradProduct& t) {
  using S = Simd<kLanes, false>;
  using Vec = typename S::Vec;
  Vec acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[r][v] = Vec{};
  }
  const float* weight = t.weight;
  const float* values = t.values;
  const float* ahead = t.ahead;
  for (int64_t left = t.channels; left > 0; left -= kLanes, values += t.channel_step) {
    const float* x = values;
    const float* const end = x + (left < kLanes ? left : kLanes);
    for (; x != end; ++x, weight += kVectors * kLanes) {
      __builtin_prefetch(ahead);
      ahead += t.ahead_step;
      Vec b[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) b[v] = S::load(weight + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec a = S::broadcast(x[r * kLanes]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) acc[r][v] += a * b[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) S::store(t.sums + r * t.sum_step + v * kLanes, acc[r][v]);
  }
}

template <int kLanes, int kPoints, int kVectors>
void winograd_output(const WinogradOutput& t) {
  using S = Simd<kLanes, false>;
  using Vec = typename S::Vec;
  constexpr int kSize = kPoints - 2, kStep = 2 * kLanes;
  // How many tiles ahead the lines of the results are prefetched, so that stores do not wait; measured with 8 lanes,
  // for which a pixel's two vectors are one line.
  constexpr int64_t kSoon = kLanes == 8 ? 2 : 0;
  const float* sums = t.sums;
  const int64_t* place = t.places;
  for (int64_t tile = 0; tile < t.tiles; ++tile, sums += kPoints * kPoints * kStep, place += kSize * kSize) {
    for (int lane = 0; lane < kVectors * kLanes; lane += kLanes) {
      const int count = static_cast<int>(t.valid) - lane;
      if (count <= 0) break;
      Vec columns[kPoints][kSize];  // [column][row]
#pragma GCC unroll 6
      for (int j = 0; j < kPoints; ++j) {
        Vec m[kPoints];
#pragma GCC unroll 6
        for (int i = 0; i < kPoints; ++i) m[i] = S::load(sums + (i * kPoints + j) * kStep + lane);
        transform_sums<kPoints>(m, columns[j]);
      }
      const Vec scale = t.scale ? S::load(t.scale + lane) : Vec{};
      const Vec shift = t.shift ? S::load(t.shift + lane) : Vec{};
      const Vec most = S::broadcast(t.out_max);
      const bool fetched = kSoon > 0 && lane == 0 && tile + kSoon < t.tiles;
#pragma GCC unroll 4
      for (int i = 0; i < kSize; ++i) {
        for (int j = 0; fetched && j < kSize; ++j) {
          const int64_t soon = place[(kSoon * kSize + i) * kSize + j];
          if (soon >= 0) __builtin_prefetch(t.out + soon * t.out_step, 1);
        }
        Vec m[kPoints], y[kSize];
#pragma GCC unroll 6
        for (int j = 0; j < kPoints; ++j) m[j] = columns[j][i];
        transform_sums<kPoints>(m, y);
#pragma GCC unroll 4
        for (int j = 0; j < kSize; ++j) {
          const int64_t pixel = place[i * kSize + j];
          if (pixel < 0) continue;
          if (t.scale) y[j] *= scale;
          if (t.shift) y[j] += shift;
          float* out = t.out + pixel * t.out_step + lane;
          if (t.residual) {
            const float* residual = t.residual + pixel * t.residual_step + lane;
            y[j] += count < kLanes ? load_part<kLanes>(residual, count) : S::load(residual);
          }
          if (t.relu) y[j] = clamped(y[j], Vec{}, most);
          count < kLanes ? store_part<kLanes>(out, y[j], count) : S::store(out, y[j]);
        }
      }
    }
  }
}

// In double, so that a transformed weight is rounded once.
template <int kLanes, int kPoints>
void winograd_weight(const WinogradWeight& t) {
  constexpr double kFour[6][3] = {{kZeroScale, 0, 0},
                                  {kNearScale, kNearScale * kNear, kNearScale * kNear2},
                                  {kNearScale, -kNearScale * kNear, kNearScale * kNear2},
                                  {kFarScale, kFarScale * kFar, kFarScale * kFar2},
                                  {kFarScale, -kFarScale * kFar, kFarScale * kFar2},
                                  {0, 0, 1}};
  constexpr double kTwo[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
  const auto g = [&](int i, int j) { return kPoints == 6 ? kFour[i][j] : kTwo[i % 4][j]; };
  double rows[kPoints][3][kLanes];
  for (int i = 0; i < kPoints; ++i) {
    for (int j = 0; j < 3; ++j) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const float* taps = t.taps + j * kLanes + lane;
        rows[i][j][lane] = g(i, 0) * taps[0] + g(i, 1) * taps[3 * kLanes] + g(i, 2) * taps[6 * kLanes];
      }
    }
  }
  for (int i = 0; i < kPoints; ++i) {
    for (int j = 0; j < kPoints; ++j) {
      float* weight = t.weight + (i * kPoints + j) * t.point_step;
      for (int lane = 0; lane < kLanes; ++lane) {
        weight[lane] =
            static_cast<float>(g(j, 0) * rows[i][0][lane] + g(j, 1) * rows[i][1][lane] + g(j, 2) * rows[i][2][lane]);
      }
    }
  }
}

template <int kLanes>
void winograd_prologue(const WinogradPrologue& t) {
  using S = Simd<kLanes, false>;
  using Vec = typename S::Vec;
  float* x = t.values;
  for (int64_t p = 0; p < t.pixels; ++p) {
    for (int64_t c = 0; c < t.channels; c += kLanes, x += kLanes) {
      Vec v = S::load(x);
      if (t.scale) v *= S::load(t.scale + c);
      if (t.shift) v += S::load(t.shift + c);
      if (t.relu) v = v < Vec{} ? Vec{} : v;
      S::store(x, v);
    }
  }
}

#if defined(__AVX512F__)
constexpr bool kGatherMoves = true;
#else
constexpr bool kGatherMoves = false;
#endif

template <int kLanes>
void gather_pixels(const PixelGather& t) {
  for (int64_t p = 0; p < t.pixels; ++p) {
    const float* in = t.in + p * t.in_step;
    float* out = t.out + p * t.out_step;
#if defined(__AVX512F__)
    // A permutation takes the lowest four bits of each index: the places in a chunk.
    __m512 moved = _mm512_setzero_ps();
    int64_t left = t.channels;
    const int32_t* list = t.list;
    for (const GatherMove *move = t.moves, *end = move + t.move_count; move != end; ++move) {
      const auto lanes = static_cast<uint16_t>(left >= 16 ? 0xffff : (1 << left) - 1);
      const __m512i index = _mm512_maskz_loadu_epi32(lanes, list);
      const __m512 chunk = _mm512_maskz_loadu_ps(move->from, in + move->chunk * int64_t{16});
      moved = _mm512_mask_permutexvar_ps(moved, move->to, index, chunk);
      if (!move->last) continue;
      _mm512_storeu_ps(out, moved);
      moved = _mm512_setzero_ps();
      out += 16, list += 16, left -= 16;
    }
#else
    for (int64_t i = 0; i < t.channels; ++i) out[i] = in[t.list[i]];
#endif
  }
}

template <int kLanes, int kPoints>
constexpr WinogradTransforms make_transforms() {
  return {kPoints - 2,
          winograd_input<kLanes, kPoints>,
          {winograd_output<kLanes, kPoints, 1>, winograd_output<kLanes, kPoints, 2>},
          winograd_weight<kLanes, kPoints>,
          winograd_gradient<kLanes, kPoints>,
          winograd_taps<kLanes, kPoints>};
}

template <int kLanes, int kRows>
constexpr void fill_products(WinogradTable& table) {
  table.product[kRows - 1][0] = winograd_product<kLanes, kRows, 1>;
  table.product[kRows - 1][1] = winograd_product<kLanes, kRows, 2>;
  if constexpr (kRows > 1) fill_products<kLanes, kRows - 1>(table);
}

template <int kLanes, int kRows, int kVectors>
constexpr void fill_outer(WinogradTable& table) {
  table.outer[kVectors - 1] = winograd_outer<kLanes, kRows, kVectors>;
  if constexpr (kVectors > 1) fill_outer<kLanes, kRows, kVectors - 1>(table);
}

// Rows of an outer product divide the lanes.
template <int kLanes, int kRows, int kOuterRows, int kOuterVectors>
constexpr WinogradTable make_winograd_table() {
  static_assert(kLanes % kOuterRows == 0 && kOuterVectors <= kMostOuterVectors);
  WinogradTable table{};
  table.rows = kRows;
  table.lanes = kLanes;
  fill_products<kLanes, kRows>(table);
  table.outer_rows = kOuterRows;
  table.outer_vectors = kOuterVectors;
  fill_outer<kLanes, kOuterRows, kOuterVectors>(table);
  table.prologue = winograd_prologue<kLanes>;
  table.gather = gather_pixels<kLanes>;
  table.gather_moves = kGatherMoves;
  table.transforms[0] = make_transforms<kLanes, 6>();
  table.transforms[1] = make_transforms<kLanes, 4>();
  return table;
}
