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

}  // namespace

Checks descriptor_checks() { return {{"descriptors", descriptors}}; }

}  // namespace bap_kernels
