// See scratch.h.
#include "backends/cpu/scratch.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <array>
#include <vector>

namespace bap_kernels {

float* thread_scratch(Scratch slot, int64_t floats) {
  struct Buffer {
    c10::DataPtr data;
    int64_t floats = 0;
  };
  thread_local std::array<Buffer, static_cast<size_t>(Scratch::kCount)> buffers;
  Buffer& b = buffers[static_cast<size_t>(slot)];
  if (b.floats < floats) {
    b.data = c10::GetCPUAllocator()->allocate(floats * sizeof(float));  // 64-byte aligned
    b.floats = floats;
  }
  return static_cast<float*>(b.data.get());
}

const float* thread_zeros(int64_t count) {
  thread_local std::vector<float> values;
  if (static_cast<int64_t>(values.size()) < count) values.assign(count, 0.f);
  return values.data();
}

}  // namespace bap_kernels
