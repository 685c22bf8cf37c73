// Which instruction set the native kernels use in this process.
#pragma once

#include <string>
#include <vector>

#include "backends/cpu/microkernels/depthwise.h"
#include "backends/cpu/microkernels/gather.h"
#include "backends/cpu/microkernels/tile.h"
#include "backends/cpu/microkernels/winograd.h"

namespace bap_kernels {

// "avx512", "avx2", "neon" or "none": the best one here unless another is set. "avx512_emulated" and
// "neon_emulated" run the tiles of these in AVX2 code: slow, for tests.
const std::string& isa();
// Before the first use of isa(); raises on what the CPU or the build lacks.
void set_isa(const std::string& name);

// Why there are no native kernels where isa() is "none".
inline const char* const kNoInstructions =
    "this CPU and this build share none of AVX2, AVX-512 and NEON (or BAP_KERNELS_ISA=none is set)";

// The instruction sets that this CPU has and this library was built for, best first; always ends with "none".
std::vector<std::string> isa_available();

// True where pairs of bfloat16 are multiplied directly (AVX512_BF16, or its emulation).
bool isa_has_bfloat16_pairs();

// The tiles for plain fp32 lanes, or for pairs of bfloat16; null where there are none.
const micro::KernelTable* isa_tiles(bool pairs);

// Copies listed channels of float pixels, or of bfloat16 pixels in pairs, a vector of `lanes` at a time; empty where
// plain loops must do.
struct ChannelGatherKernel {
  void (*run)(const micro::ChannelGather&) = nullptr;
  int64_t lanes = 0;
  bool whole_loads = false;  // for pixels of at least `lanes` channels, and slow where a vector takes many loads
  explicit operator bool() const { return run != nullptr; }
};
ChannelGatherKernel isa_gather(bool pairs);

// The microkernels of Winograd convolutions; null where there are none.
const micro::WinogradTable* isa_winograd();

// Likewise those of depthwise convolutions.
const micro::DepthwiseTable* isa_depthwise();

// Text that names the CPU model; part of the key under which measurements are kept.
std::string cpu_model();

}  // namespace bap_kernels
