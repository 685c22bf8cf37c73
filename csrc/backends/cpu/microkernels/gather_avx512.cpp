#include <immintrin.h>

#include "backends/cpu/microkernels/gather.h"

namespace bap_kernels::micro {
namespace {
#include "backends/cpu/microkernels/gather_kernel.h"
}  // namespace

void gather_floats_avx512(const ChannelGather& gather) { gather_channels<Floats>(gather); }

}  // namespace bap_kernels::micro
