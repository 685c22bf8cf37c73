// NEON: tiles of 12 x 8 fill 24 of the 32 registers; two hold the vector operand, one the broadcast.
#include "backends/cpu/microkernels/tile.h"

namespace bap_kernels::micro {
namespace {
#include "backends/cpu/microkernels/simd.h"

#include "backends/cpu/microkernels/tile_kernel.h"
constexpr KernelTable kTable = make_table<4, false, 12>();
}  // namespace

const KernelTable* table_neon() { return &kTable; }

}  // namespace bap_kernels::micro
