// The AVX-512 microkernels compiled for AVX2: slow, for testing their logic on machines without AVX-512.
#include "backends/cpu/microkernels/winograd.h"

#include <immintrin.h>

#include "backends/cpu/microkernels/tile.h"

namespace bap_kernels::micro {
namespace {
#include "backends/cpu/microkernels/simd.h"

#include "backends/cpu/microkernels/winograd_transforms.h"

#include "backends/cpu/microkernels/winograd_kernel.h"
constexpr WinogradTable kTable = make_winograd_table<16, 14, 8, 3>();
}  // namespace

const WinogradTable* winograd_emulated() { return &kTable; }

}  // namespace bap_kernels::micro
