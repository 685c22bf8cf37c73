// Instructions that CUDA C++ has no names for, compute capability 8.0 and up: asynchronous copies, matrix loads and
// products. `at` and `to` are bytes from the start of shared memory.
#pragma once

#include "backends/cuda/kernels/elements.cuh"
#include "backends/cuda/kernels/tile_layout.h"

namespace bap_kernels {

// All of a block's shared memory, whose size is a launch's; aligned for the swizzle of WGMMA (matrix_descriptor.h).
extern __shared__ __align__(1024) unsigned char shared_memory[];

__device__ __forceinline__ uint32_t shared_address(int at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) + at;
}
template <typename value_t>
__device__ __forceinline__ value_t& shared(int at) {
  return *reinterpret_cast<value_t*>(shared_memory + at);
}

// Starts a copy of `bytes` of kBytes (4, 8 or 16) to shared memory, zeros behind them; nothing is read if `bytes` is 0.
template <int kBytes = kChunkBytes>
__device__ __forceinline__ void copy_async(int to, const void* from, int bytes) {
  if constexpr (kBytes == kChunkBytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}
// The same of 16 bytes, or of zeros where `skip` holds: nothing is read then, and `from` may be anywhere.
__device__ __forceinline__ void copy_async_unless(bool skip, int to, const void* from) {
  asm volatile(
      "{\n.reg .pred skip;\nsetp.ne.u32 skip, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, skip;\n}\n" ::"r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(static_cast<uint32_t>(skip))
      : "memory");
}
// A copy of one chunk of a row: zeros with `skip`. kWhole: all of its 16 bytes; else the first `bytes`, zeros behind
// them. A number of bytes that the assembler does not know costs five instructions for each copy.
template <bool kWhole>
__device__ __forceinline__ void copy_chunk_unless(bool skip, int to, const void* from, int bytes) {
  if constexpr (kWhole) {
    copy_async_unless(skip, to, from);
  } else {
    copy_async(to, from, skip ? 0 : bytes);
  }
}

// The copies that the thread has started since the last call are a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the thread's last kLeft groups have landed.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four 8x8 matrices of 2-byte words; lane l gives the address of row l mod 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], int at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(at))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], int at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(at))
               : "memory");
}

// c += a * b: 16 rows x 8 columns x 32 bytes of depth.
template <MathMode kMode>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kMode == MathMode::kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (kMode == MathMode::kHalf) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace bap_kernels
