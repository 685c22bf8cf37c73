// The NEON tiles compiled for AVX2: for testing what surrounds them on machines without NEON.
#include <immintrin.h>

#include "backends/cpu/microkernels/tile.h"

namespace bap_kernels::micro {
namespace {
#include "backends/cpu/microkernels/simd.h"

#include "backends/cpu/microkernels/tile_kernel.h"
constexpr KernelTable kTable = make_table<4, false, 12>();
}  // namespace

const KernelTable* table_neon_emulated() { return &kTable; }

}  // namespace bap_kernels::micro
