// AVX-512: products of 14 tiles x 32 channels, as in tile_avx512.cpp.
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

const WinogradTable* winograd_avx512() { return &kTable; }

}  // namespace bap_kernels::micro
