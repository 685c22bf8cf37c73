// The AVX-512 microkernels compiled for AVX2: slow, for testing their logic on machines without AVX-512.
#include "backends/cpu/microkernels/depthwise.h"

#include <immintrin.h>

#include "backends/cpu/microkernels/tile.h"

namespace bap_kernels::micro {
namespace {
#include "backends/cpu/microkernels/simd.h"

#include "backends/cpu/microkernels/depthwise_kernel.h"
constexpr DepthwiseTable kTable = make_depthwise_table<16>();
}  // namespace

const DepthwiseTable* depthwise_emulated() { return &kTable; }

}  // namespace bap_kernels::micro
