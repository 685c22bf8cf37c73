// AVX2: products of 6 tiles x 16 channels, as in tile_avx2.cpp.
#include "backends/cpu/microkernels/winograd.h"

#include <immintrin.h>

#include "backends/cpu/microkernels/tile.h"

namespace bap_kernels::micro {
namespace {
#include "backends/cpu/microkernels/simd.h"

#include "backends/cpu/microkernels/winograd_transforms.h"

#include "backends/cpu/microkernels/winograd_kernel.h"
constexpr WinogradTable kTable = make_winograd_table<8, 6, 4, 3>();
}  // namespace

const WinogradTable* winograd_avx2() { return &kTable; }

}  // namespace bap_kernels::micro
