// What the CPU and the operating system let this process execute. No torch header, so that small programs can ask too.
#pragma once

namespace bap_kernels {

// `isa`: "avx2" (with FMA), "avx512" (F, BW, VL, DQ) or "avx512bf16"; any other name is false.
bool cpu_has(const char* isa);

}  // namespace bap_kernels
