// The device as the block of a kernel: asynchronous copies, matrix loads and mma, sm_80 and
// up. The text of the kernels is in *_block.h; what is here is all that a simulation on the host replaces.
#pragma once

#include "backends/cuda/kernels/block_parts.h"

namespace bap_kernels {

extern __shared__ __align__(1024) unsigned char shared_memory[];

template <class State>
class DeviceBlock {
 public:
  __device__ __forceinline__ DeviceBlock() : shared_(static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory))) {}

  __device__ __forceinline__ int block_x() const { return static_cast<int>(blockIdx.x); }
  __device__ __forceinline__ int block_y() const { return static_cast<int>(blockIdx.y); }

  template <class Function>
  __device__ __forceinline__ void each(Function&& function) {
    function(static_cast<int>(threadIdx.x), state_);
  }
  __device__ __forceinline__ void sync() { __syncthreads(); }

  // Copies `bytes` of 16 and fills the rest with zeros; nothing is read where `bytes` is 0.
  __device__ __forceinline__ void copy_chunk(int, int to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_ + to),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes)
                 : "memory");
  }
  // The same for 4, 8 or 16 bytes.
  template <int kBytes>
  __device__ __forceinline__ void copy_part(int thread, int to, const void* from, int bytes) {
    if constexpr (kBytes == kChunkBytes) {
      copy_chunk(thread, to, from, bytes);
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_ + to),
                   "l"(__cvta_generic_to_global(from)), "n"(kBytes), "r"(bytes)
                   : "memory");
    }
  }
  __device__ __forceinline__ void commit(int) { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int kLeft>
  __device__ __forceinline__ void wait(int) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
  }

  template <typename value_t>
  __device__ __forceinline__ void store(int, int at, value_t value) {
    *reinterpret_cast<value_t*>(shared_memory + at) = value;
  }
  template <typename value_t>
  __device__ __forceinline__ value_t load(int, int at) const {
    return *reinterpret_cast<const value_t*>(shared_memory + at);
  }
  template <typename scalar_t>
  __device__ __forceinline__ void store_chunk(int thread, int at, const Chunk<scalar_t>& chunk) {
    store(thread, at, reinterpret_cast<const uint4&>(chunk));
  }
  __device__ __forceinline__ uint32_t load_word(int thread, int at) const { return load<uint32_t>(thread, at); }

  template <class Offset>
  __device__ __forceinline__ void load_matrices(int thread, uint32_t (&r)[4], Offset&& offset) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_ + offset(thread % kWarp))
                 : "memory");
  }
  template <class Offset>
  __device__ __forceinline__ void load_matrices_transposed(int thread, uint32_t (&r)[4], Offset&& offset) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_ + offset(thread % kWarp))
                 : "memory");
  }

  // All products of the fragments that each thread holds.
  template <MathMode kMode, class Tile>
  __device__ __forceinline__ void multiply() {
    if constexpr (kMode == MathMode::kBFloat16 || kMode == MathMode::kHalf) {
      BAP_UNROLL
      for (int i = 0; i < Tile::kMmasM; ++i) {
        BAP_UNROLL
        for (int j = 0; j < Tile::kMmasN; ++j) mma<kMode>(state_.sums[i][j], state_.a[i], state_.b[j]);
      }
    } else {
      BAP_UNROLL
      for (int j = 0; j < Tile::kMmasN; ++j) round(state_.b[j]);
      BAP_UNROLL
      for (int i = 0; i < Tile::kMmasM; ++i) {
        round(state_.a[i]);
        BAP_UNROLL
        for (int j = 0; j < Tile::kMmasN; ++j) mma<kMode>(state_.sums[i][j], state_.a[i], state_.b[j]);
      }
    }
  }

 private:
  template <int kCount>
  __device__ __forceinline__ static void round(uint32_t (&words)[kCount]) {
    BAP_UNROLL
    for (int r = 0; r < kCount; ++r) words[r] = to_tf32(words[r]);
  }

  template <MathMode kMode>
  __device__ __forceinline__ static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
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

 protected:
  uint32_t shared_;
  State state_;
};

}  // namespace bap_kernels
