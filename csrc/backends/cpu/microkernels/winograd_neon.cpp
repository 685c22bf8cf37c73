// NEON: products of 12 tiles x 8 channels, as in tile_neon.cpp.
#include "backends/cpu/microkernels/winograd.h"

#include "backends/cpu/microkernels/tile.h"

namespace bap_kernels::micro {
namespace {
#include "backends/cpu/microkernels/simd.h"

#include "backends/cpu/microkernels/winograd_transforms.h"

#include "backends/cpu/microkernels/winograd_kernel.h"
constexpr WinogradTable kTable = make_winograd_table<4, 12, 4, 6>();
}  // namespace

const WinogradTable* winograd_neon() { return &kTable; }

}  // namespace bap_kernels::micro
