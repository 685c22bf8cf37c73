// Products of warpgroups: where their operands lie.
#include "backends/cuda/kernels/matrix_descriptor.h"
#include "check.h"

namespace bap_kernels {
namespace {

void descriptors() {
  for (const uint32_t start : {0u, 1024u, 16384u, 49152u, 196608u}) {
    const uint64_t d = matrix_descriptor(start);
    require((d & 0x3fff) == start / 16 && (d >> 14 & 3) == 0, "the address is not where it belongs");
    require((d >> 32 & 0x3fff) == 64 && (d >> 46 & 3) == 0, "groups of rows are not 1024 bytes apart");
    require((d >> 49 & 7) == 0 && d >> 62 == 1 && (d >> 52 & 0x3ff) == 0, "the layout is another one");
    for (int slice = 0; slice < kSlices; ++slice) {
      for (int row = 0; row < 256; ++row) {
        for (int half = 0; half < 2; ++half) {
          const uint32_t address = start + slice * kSliceBytes + row / 8 * 1024 + row % 8 * 128 + half * 16;
          require(exchanged(address) == start + by_rows(row, 2 * slice + half), "a chunk is read from another place");
        }
      }
    }
  }
}

void transposed_descriptors() {
  for (const uint32_t start : {0u, 16384u, 49152u, 180224u}) {
    const uint64_t d = transposed_descriptor(start);
    require((d & 0x3fff) == start / 16 && (d >> 14 & 3) == 0, "the address is not where it belongs");
    require((d >> 16 & 0x3fff) * 16 == kPanelBytes && (d >> 30 & 3) == 0, "panels lie elsewhere");
    require((d >> 32 & 0x3fff) * 16 == kGroupBytes && (d >> 46 & 3) == 0, "groups of depths are not 1024 bytes apart");
    require((d >> 49 & 7) == 0 && d >> 62 == 1 && (d >> 52 & 0x3ff) == 0, "the layout is another one");
    for (int depth = 0; depth < 64; ++depth) {
      for (int row = 0; row < 128; row += 8) {
        // A slice's depths count from its own start.
        const uint32_t slice = start + depth / 16 * kPanelSliceBytes;
        const uint32_t address =
            slice + row / 64 * kPanelBytes + depth % 16 / 8 * kGroupBytes + depth % 8 * 128 + row % 64 * 2;
        const uint32_t copied = start + row / 64 * kPanelBytes + by_rows(depth, row % 64 / 8);
        require(exchanged(address) == copied, "a chunk is read from another place");
      }
    }
  }
}

}  // namespace

Checks descriptor_checks() {
  return {{"descriptors", descriptors}, {"transposed_descriptors", transposed_descriptors}};
}

}  // namespace bap_kernels
