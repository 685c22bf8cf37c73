// Runs the stores and sums of computed input gradients against plain loops in double precision: lengths, steps and
// what is left out at random, operands that end, or begin, at a page that may not be touched. What lies beside the
// results must stay as it is. Exit status: 0 if all agree, else 1.
#include "backends/cpu/microkernels/gradient_rows.h"

#include <cmath>
#include <cstdio>
#include <vector>

#include "guarded.h"

namespace {

using namespace bap_kernels::micro;

constexpr int64_t kBytes = 16384;

float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

double value_of(const float* p) { return *p; }
double value_of(const uint16_t* p) { return float_of(static_cast<uint32_t>(*p) << 16); }
void put(float* p, float v) { *p = v; }
void put(uint16_t* p, float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  *p = static_cast<uint16_t>(bits >> 16);
}

// The nearest float or bfloat16, by its definition.
double stored(const float*, float v) { return v; }
double stored(const uint16_t*, float v) {
  if (v == 0) return v;
  int exponent;
  std::frexp(static_cast<double>(v), &exponent);
  const double unit = std::ldexp(1.0, exponent - 8);
  return std::nearbyint(v / unit) * unit;
}

class Test {
 public:
  explicit Test(uint64_t seed) : random_(seed) {}

  template <class T>
  bool pixel() {
    const int64_t n = 1 + random_.below(70);
    const float* part = floats(part_, n);
    const T* x = numbers<T>(x_, n, 1);
    T* dx = random_.below(4) ? place<T>(dx_, n, 1) : nullptr;
    float* dots = random_.below(3) ? floats(dots_, n) : nullptr;
    uint32_t* keep = dx && random_.below(2) ? reinterpret_cast<uint32_t*>(floats(keep_, n)) : nullptr;
    for (int64_t c = 0; keep && c < n; ++c) keep[c] = random_.below(2) ? ~0u : 0u;
    std::vector<double> sums(n);
    for (int64_t c = 0; dots && c < n; ++c) sums[c] = dots[c] + static_cast<double>(part[c]) * value_of(x + c);
    const std::vector<char> before = dx_.copy();
    gradient_pixel(part, x, dx, keep, dots, n);
    bool right = true;
    for (int64_t c = 0; dots && c < n; ++c) right = right && std::fabs(dots[c] - sums[c]) < 1e-6;
    for (int64_t c = 0; dx && c < n; ++c)
      right = right && value_of(dx + c) == (keep && !keep[c] ? 0. : stored(dx, part[c]));
    return right && untouched(before, dx, n, 1);
  }

  template <class T>
  bool run() {
    const int64_t n = 1 + random_.below(150), x_step = 1 + random_.below(3), dx_step = 1 + random_.below(3);
    const float* part = floats(part_, n);
    const T* x = random_.below(4) ? numbers<T>(x_, n, x_step) : nullptr;
    T* dx = random_.below(4) ? place<T>(dx_, n, dx_step) : nullptr;
    double sum = 0;
    for (int64_t i = 0; x && i < n; ++i) sum += static_cast<double>(part[i]) * value_of(x + i * x_step);
    const std::vector<char> before = dx_.copy();
    bool right = std::fabs(gradient_run(part, x, x_step, dx, dx_step, n) - sum) < 1e-4;
    for (int64_t i = 0; dx && i < n; ++i) right = right && value_of(dx + i * dx_step) == stored(dx, part[i]);
    return right && untouched(before, dx, n, dx_step);
  }

  template <class T>
  bool pairs() {
    const int64_t n = 1 + random_.below(100), n_odd = n - random_.below(2), all = n + n_odd;
    const float *even = floats(part_, n), *odd = floats(odd_, n_odd);
    const T* x = random_.below(4) ? numbers<T>(x_, all, 1) : nullptr;
    T* dx = random_.below(4) ? place<T>(dx_, all, 1) : nullptr;
    const auto part = [&](int64_t i) { return i % 2 ? odd[i / 2] : even[i / 2]; };
    double sum = 0;
    for (int64_t i = 0; x && i < all; ++i) sum += static_cast<double>(part(i)) * value_of(x + i);
    const std::vector<char> before = dx_.copy();
    bool right = std::fabs(gradient_pairs(even, odd, x, dx, n, n_odd) - sum) < 1e-4;
    for (int64_t i = 0; dx && i < all; ++i) right = right && value_of(dx + i) == stored(dx, part(i));
    return right && untouched(before, dx, all, 1);
  }

 private:
  float* floats(Guarded& memory, int64_t n) {
    auto* p = reinterpret_cast<float*>(memory.place(n * 4, random_.below(2)));
    for (int64_t i = 0; i < n; ++i) p[i] = random_.real();
    return p;
  }

  template <class T>
  T* place(Guarded& memory, int64_t n, int64_t step) {
    return reinterpret_cast<T*>(memory.place(((n - 1) * step + 1) * static_cast<int64_t>(sizeof(T)), random_.below(2)));
  }

  template <class T>
  T* numbers(Guarded& memory, int64_t n, int64_t step) {
    T* p = place<T>(memory, n, step);
    for (int64_t i = 0; i < n; ++i) put(p + i * step, random_.real());
    return p;
  }

  // Whether everything but the n elements at dx is as it was.
  template <class T>
  bool untouched(const std::vector<char>& before, const T* dx, int64_t n, int64_t step) {
    const std::vector<char> after = dx_.copy();
    const int64_t first = dx ? reinterpret_cast<const char*>(dx) - dx_.data() : 0, size = sizeof(T);
    for (int64_t b = 0; b < static_cast<int64_t>(after.size()); ++b) {
      const int64_t element = (b - first) / size;
      const bool own = dx && b >= first && element % step == 0 && element / step < n;
      if (!own && after[b] != before[b]) return false;
    }
    return true;
  }

  Random random_;
  Guarded part_{kBytes}, odd_{kBytes}, x_{kBytes}, dx_{kBytes}, dots_{kBytes}, keep_{kBytes};
};

}  // namespace

int main() {
  int calls = 0;
  for (int seed = 0; seed < 1000; ++seed) {
    Test test(seed);
    const bool right[] = {test.pixel<float>(),  test.pixel<uint16_t>(), test.run<float>(),
                          test.run<uint16_t>(), test.pairs<float>(),    test.pairs<uint16_t>()};
    for (int i = 0; i < 6; ++i, ++calls) {
      if (right[i]) continue;
      std::printf("seed %d, call %d: wrong\n", seed, i);
      return 1;
    }
  }
  std::printf("%d calls: ok\n", calls);
  return 0;
}
