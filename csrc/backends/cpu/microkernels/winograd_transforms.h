// The transforms of Winograd's minimal filtering in one dimension, of vectors whose lanes are channels.
// Points 0, 1, -1 and infinity for F(2 x 2); 0, 3/4, -3/4, 3/2, -3/2 and infinity for F(4 x 4): with the usual 1 and 2
// the errors are four times as large. All constants of B and A are exact in float32.
// Included by one source file per instruction set behind simd.h, inside that file's own anonymous namespace.

constexpr float kNear = .75f, kFar = 1.5f;
constexpr float kNear2 = kNear * kNear, kFar2 = kFar * kFar, kNear3 = kNear2 * kNear, kFar3 = kFar2 * kFar;

// One vector of pixels to their transform, by B^T; in place.
template <int kPoints, class Vec>
inline __attribute__((always_inline)) void transform_pixels(Vec* d) {
  if constexpr (kPoints == 6) {
    constexpr float kProduct = kNear2 * kFar2, kSum = kNear2 + kFar2;
    const Vec near_even = d[4] - kFar2 * d[2], near_odd = d[3] - kFar2 * d[1];
    const Vec far_even = d[4] - kNear2 * d[2], far_odd = d[3] - kNear2 * d[1];
    const Vec first = kProduct * d[0] + (d[4] - kSum * d[2]), last = kProduct * d[1] + (d[5] - kSum * d[3]);
    d[0] = first;
    d[1] = near_even + kNear * near_odd;
    d[2] = near_even - kNear * near_odd;
    d[3] = far_even + kFar * far_odd;
    d[4] = far_even - kFar * far_odd;
    d[5] = last;
  } else {
    const Vec first = d[0] - d[2], sum = d[1] + d[2], difference = d[2] - d[1], last = d[1] - d[3];
    d[0] = first;
    d[1] = sum;
    d[2] = difference;
    d[3] = last;
  }
}

// Sums at the points to results, by A^T.
template <int kPoints, class Vec>
inline __attribute__((always_inline)) void transform_sums(const Vec* m, Vec* y) {
  if constexpr (kPoints == 6) {
    const Vec near_sum = m[1] + m[2], near_difference = m[1] - m[2];
    const Vec far_sum = m[3] + m[4], far_difference = m[3] - m[4];
    y[0] = m[0] + (near_sum + far_sum);
    y[1] = kNear * near_difference + kFar * far_difference;
    y[2] = kNear2 * near_sum + kFar2 * far_sum;
    y[3] = kNear3 * near_difference + (kFar3 * far_difference + m[5]);
  } else {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) - m[3];
  }
}

// Gradients of results to the points, by A.
template <int kPoints, class Vec>
inline __attribute__((always_inline)) void transform_gradients(const Vec* g, Vec* m) {
  if constexpr (kPoints == 6) {
    const Vec near_even = g[0] + kNear2 * g[2], near_odd = kNear * g[1] + kNear3 * g[3];
    const Vec far_even = g[0] + kFar2 * g[2], far_odd = kFar * g[1] + kFar3 * g[3];
    m[0] = g[0];
    m[1] = near_even + near_odd;
    m[2] = near_even - near_odd;
    m[3] = far_even + far_odd;
    m[4] = far_even - far_odd;
    m[5] = g[3];
  } else {
    m[0] = g[0];
    m[1] = g[0] + g[1];
    m[2] = g[0] - g[1];
    m[3] = -g[1];
  }
}

// Rows of G at the points 0, near and far are (1, p, p^2) over the product of p's distances from the other points.
constexpr double kZeroScale = 1. / (kNear2 * kFar2), kNearScale = 1 / (2. * kNear2 * (kNear2 - kFar2)),
                 kFarScale = 1 / (2. * kFar2 * (kFar2 - kNear2));

// Sums at the points to taps, by G^T.
template <int kPoints, class Vec>
inline __attribute__((always_inline)) void transform_taps(const Vec* m, Vec* w) {
  if constexpr (kPoints == 6) {
    constexpr auto kZero = static_cast<float>(kZeroScale);
    constexpr auto kNear0 = static_cast<float>(kNearScale), kFar0 = static_cast<float>(kFarScale);
    const Vec near_sum = kNear0 * (m[1] + m[2]), near_difference = kNear0 * (m[1] - m[2]);
    const Vec far_sum = kFar0 * (m[3] + m[4]), far_difference = kFar0 * (m[3] - m[4]);
    w[0] = kZero * m[0] + (near_sum + far_sum);
    w[1] = kNear * near_difference + kFar * far_difference;
    w[2] = (kNear2 * near_sum + kFar2 * far_sum) + m[5];
  } else {
    const Vec sum = .5f * (m[1] + m[2]);
    w[0] = m[0] + sum;
    w[1] = .5f * (m[1] - m[2]);
    w[2] = sum + m[3];
  }
}
