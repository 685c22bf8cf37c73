#include <immintrin.h>

#include "backends/cpu/microkernels/gather.h"

namespace bap_kernels::micro {
namespace {
#include "backends/cpu/microkernels/gather_kernel.h"
}  // namespace

void gather_pairs_avx512bf16(const ChannelGather& gather) { gather_channels<Pairs>(gather); }

}  // namespace bap_kernels::micro
