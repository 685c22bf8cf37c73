// The compiler's own check, which asks the CPU for the instructions and XCR0 for the registers that the system saves.
#include "backends/cpu/cpu_features.h"

#include <cstring>

namespace bap_kernels {

bool cpu_has(const char* isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (std::strcmp(isa, "avx2") == 0) return avx2;
  if (std::strcmp(isa, "avx512") == 0) return avx512;
  if (std::strcmp(isa, "avx512bf16") == 0) return avx512 && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
  return std::strcmp(isa, "neon") == 0;  // every such CPU has it
#endif
  return false;
}

}  // namespace bap_kernels
