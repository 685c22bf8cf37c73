// AVX512_BF16: the AVX-512 tiles over pairs of bfloat16, two products a lane and step.
#include <immintrin.h>

#include "backends/cpu/microkernels/tile.h"

namespace bap_kernels::micro {
namespace {
#include "backends/cpu/microkernels/simd.h"

#include "backends/cpu/microkernels/tile_kernel.h"
constexpr KernelTable kTable = make_table<16, true, 14>();
}  // namespace

const KernelTable* table_avx512_pairs() { return &kTable; }

}  // namespace bap_kernels::micro
