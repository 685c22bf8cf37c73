// AVX2: 6 x 2 vectors fill 12 of the 16 registers; two hold a tap's weights.
#include "backends/cpu/microkernels/depthwise.h"

#include <immintrin.h>

#include "backends/cpu/microkernels/tile.h"

namespace bap_kernels::micro {
namespace {
#include "backends/cpu/microkernels/simd.h"

#include "backends/cpu/microkernels/depthwise_kernel.h"
constexpr DepthwiseTable kTable = make_depthwise_table<8>();
}  // namespace

const DepthwiseTable* depthwise_avx2() { return &kTable; }

}  // namespace bap_kernels::micro
