// NEON.
#include "backends/cpu/microkernels/depthwise.h"

#include "backends/cpu/microkernels/tile.h"

namespace bap_kernels::micro {
namespace {
#include "backends/cpu/microkernels/simd.h"

#include "backends/cpu/microkernels/depthwise_kernel.h"
constexpr DepthwiseTable kTable = make_depthwise_table<4>();
}  // namespace

const DepthwiseTable* depthwise_neon() { return &kTable; }

}  // namespace bap_kernels::micro
