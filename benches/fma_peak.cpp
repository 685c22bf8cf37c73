// Multiply-adds that never leave the registers: the FLOP/s that no kernel of this machine can exceed.
// Twelve independent accumulators of one vector each hide the latency of a fused multiply-add.

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#else
constexpr int kBytes = 32;
#endif
constexpr int kLanes = kBytes / static_cast<int>(sizeof(float));
constexpr int kAccumulators = 12;

typedef float Vector __attribute__((vector_size(kBytes)));

// Returns the FLOP done: 2 per lane, accumulator and step. `sink` keeps the compiler from dropping the work.
extern "C" double fma_peak(long steps, float* sink) {
  Vector acc[kAccumulators];
  Vector factor, addend;
  for (int lane = 0; lane < kLanes; ++lane) {
    factor[lane] = 0.999f;
    addend[lane] = 1e-3f * static_cast<float>(lane + 1);
  }
  for (int i = 0; i < kAccumulators; ++i) acc[i] = addend * static_cast<float>(i);
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) acc[i] = acc[i] * factor + addend;
  }
  Vector sum = acc[0];
  for (int i = 1; i < kAccumulators; ++i) sum += acc[i];
  for (int lane = 0; lane < kLanes; ++lane) sink[lane] = sum[lane];
  return 2.0 * kLanes * kAccumulators * static_cast<double>(steps);
}
