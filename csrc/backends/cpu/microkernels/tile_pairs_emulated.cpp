// The AVX512_BF16 tiles compiled for AVX2: slow, for testing their logic on machines without it.
#include <immintrin.h>

#include "backends/cpu/microkernels/tile.h"

namespace bap_kernels::micro {
namespace {
#include "backends/cpu/microkernels/simd.h"

#include "backends/cpu/microkernels/tile_kernel.h"
constexpr KernelTable kTable = make_table<16, true, 14>();
}  // namespace

const KernelTable* table_avx512_emulated_pairs() { return &kTable; }

}  // namespace bap_kernels::micro
