// The NEON microkernels compiled for AVX2: slow, for testing their logic on machines without NEON.
#include "backends/cpu/microkernels/depthwise.h"

#include <immintrin.h>

#include "backends/cpu/microkernels/tile.h"

namespace bap_kernels::micro {
namespace {
#include "backends/cpu/microkernels/simd.h"

#include "backends/cpu/microkernels/depthwise_kernel.h"
constexpr DepthwiseTable kTable = make_depthwise_table<4>();
}  // namespace

const DepthwiseTable* depthwise_neon_emulated() { return &kTable; }

}  // namespace bap_kernels::micro
