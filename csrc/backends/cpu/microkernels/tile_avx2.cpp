// AVX2: tiles of 6 x 16 fill 12 of the 16 registers; two hold the vector operand, one the broadcast.
#include <immintrin.h>

#include "backends/cpu/microkernels/tile.h"

namespace bap_kernels::micro {
namespace {
#include "backends/cpu/microkernels/simd.h"

#include "backends/cpu/microkernels/tile_kernel.h"
constexpr KernelTable kTable = make_table<8, false, 6>();
}  // namespace

const KernelTable* table_avx2() { return &kTable; }

}  // namespace bap_kernels::micro
