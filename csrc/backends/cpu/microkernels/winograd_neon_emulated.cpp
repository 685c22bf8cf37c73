// The NEON microkernels compiled for AVX2: slow, for testing their logic on machines without NEON.
#include "backends/cpu/microkernels/winograd.h"

#include <immintrin.h>

#include "backends/cpu/microkernels/tile.h"

namespace bap_kernels::micro {
namespace {
#include "backends/cpu/microkernels/simd.h"

#include "backends/cpu/microkernels/winograd_transforms.h"

#include "backends/cpu/microkernels/winograd_kernel.h"
constexpr WinogradTable kTable = make_winograd_table<4, 12, 4, 6>();
}  // namespace

const WinogradTable* winograd_neon_emulated() { return &kTable; }

}  // namespace bap_kernels::micro
