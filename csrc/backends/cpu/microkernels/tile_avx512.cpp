// AVX-512: tiles of 14 x 32 fill 28 of the 32 registers; two hold the vector operand, one the broadcast.
#include <immintrin.h>

#include "backends/cpu/microkernels/tile.h"

namespace bap_kernels::micro {
namespace {
#include "backends/cpu/microkernels/simd.h"

#include "backends/cpu/microkernels/tile_kernel.h"
constexpr KernelTable kTable = make_table<16, false, 14>();
}  // namespace

const KernelTable* table_avx512() { return &kTable; }

}  // namespace bap_kernels::micro
