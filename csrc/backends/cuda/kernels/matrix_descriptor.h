// How WGMMA (compute capability 9.0a) is told where an operand lies in shared memory.
//
// An operand has rows of 128 bytes of depth; 8 rows are a group of 1024 bytes, which begins at a multiple of that. The
// instruction finds a chunk of 16 bytes by an address with bits 4 to 6 exchanged by bits 7 to 9 (XOR), which is where
// by_rows puts it: the layout of the copies is the instruction's own, "K-major, swizzle of 128 bytes".
// A slice, 32 bytes of depth, is reached by its first row's first byte before the exchange.
#pragma once

#include "backends/cuda/kernels/tile_layout.h"

namespace bap_kernels {

constexpr int kWarpgroup = 128;
constexpr int kWarpgroupRows = 64;  // of the result of one product
constexpr int kGroupRows = 8, kGroupBytes = kGroupRows * kDepthBytes;

// Where the byte lies that the instruction asks for at an address.
BAP_HOST_DEVICE constexpr uint32_t exchanged(uint32_t address) { return address ^ ((address >> 7 & 7u) << 4); }

// The descriptor of an operand, or of one slice of it, that begins at an address of shared memory. Bits 0 to 13: the
// address in units of 16 bytes. Bits 16 to 29: a distance that this layout does not use. Bits 32 to 45: from a group
// of rows to the next, in the same units. Bits 49 to 51: 0, since groups begin at multiples of their size. Bits 62 and
// 63: 1, the swizzle of 128 bytes.
BAP_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t address) {
  return uint64_t{(address & 0x3ffffu) >> 4} | uint64_t{1} << 16 |
         static_cast<uint64_t>(kGroupBytes / kChunkBytes) << 32 | uint64_t{1} << 62;
}

// An operand that lies by depth is transposed by the instruction, 16-bit elements alone ("MN-major"). It consists of
// panels of 64 rows, 128 bytes for each depth, and 8 depths are a group. Chunks are exchanged as above: a chunk lies
// where by_rows(depth, chunk) puts it within its panel. A slice, 16 depths, begins two groups further.
constexpr int kPanelChannels = kDepthBytes / 2;
constexpr int kPanelBytes = 64 * kDepthBytes;  // of the 64 depths of a stage
constexpr int kPanelSliceBytes = 2 * kGroupBytes;

// As matrix_descriptor. Bits 16 to 29: from a panel to the next. Bits 32 to 45: from a group of depths to the next.
BAP_HOST_DEVICE constexpr uint64_t transposed_descriptor(uint32_t address) {
  return uint64_t{(address & 0x3ffffu) >> 4} | static_cast<uint64_t>(kPanelBytes / kChunkBytes) << 16 |
         static_cast<uint64_t>(kGroupBytes / kChunkBytes) << 32 | uint64_t{1} << 62;
}

}  // namespace bap_kernels
