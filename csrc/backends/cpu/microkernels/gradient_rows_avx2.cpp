// AVX2: stores and sums of computed input gradients.
#include "backends/cpu/microkernels/gradient_rows.h"

#include <immintrin.h>

namespace bap_kernels::micro {
#include "backends/cpu/microkernels/gradient_rows_kernel.h"
}  // namespace bap_kernels::micro
