// The instructions of a kernel of warpgroups, compute capability 9.0a alone: barriers in shared memory, registers that
// change hands, products of whole warpgroups. `at` is a byte of shared memory.
#pragma once

#include "backends/cuda/kernels/instructions.cuh"
#include "backends/cuda/kernels/matrix_descriptor.h"

namespace bap_kernels {

__device__ __forceinline__ void init_barrier(int at, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(count) : "memory");
}
// Waits until the phase of this parity has been completed.
__device__ __forceinline__ void wait_for_barrier(int at, int parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}\n"
        : "=r"(done)
        : "r"(shared_address(at)), "r"(parity)
        : "memory");
  }
}
__device__ __forceinline__ void arrive(int at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(at)) : "memory");
}
// The thread arrives when all copies that it has started have landed.
__device__ __forceinline__ void arrive_after_copies(int at) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(at)) : "memory");
}
__device__ __forceinline__ void wait_for_all_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Arrives, and makes the phase wait for so many bytes of bulk copies besides.
template <int kBytes>
__device__ __forceinline__ void arrive_expecting(int at) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)), "n"(kBytes)
               : "memory");
}
// Starts a copy of kBytes, which the barrier counts as they land. Both addresses are multiples of 16.
template <int kBytes>
__device__ __forceinline__ void copy_bulk(int to, const void* from, int barrier) {
  static_assert(kBytes % 16 == 0, "whole chunks");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "n"(kBytes), "r"(shared_address(barrier))
               : "memory");
}
// What the thread has written, copies that it has waited for among it, is seen by the products and bulk copies that
// follow: they reach shared memory through another path, the asynchronous proxy.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// A barrier of the first kCount threads.
template <int kCount>
__device__ __forceinline__ void sync_threads() {
  asm volatile("bar.sync 1, %0;" ::"n"(kCount) : "memory");
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Keeps the compiler from moving other uses of the sums across.
template <int kColumns>
__device__ __forceinline__ void hold_sums(float (&c)[kColumns][4]) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int r = 0; r < 4; ++r) asm volatile("" : "+f"(c[j][r])::"memory");
  }
}
// Before products whose sums other instructions have written.
template <int kColumns>
__device__ __forceinline__ void begin_products(float (&c)[kColumns][4]) {
  hold_sums(c);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all but the last kLeft groups of products.
template <int kLeft>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Operands of one product: 4, 16 or 64 sums from column 8 i on.
#define BAP_SUMS_4(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define BAP_SUMS_16(i) BAP_SUMS_4(i), BAP_SUMS_4(i + 1), BAP_SUMS_4(i + 2), BAP_SUMS_4(i + 3)
#define BAP_SUMS_64(i) BAP_SUMS_16(i), BAP_SUMS_16(i + 4), BAP_SUMS_16(i + 8), BAP_SUMS_16(i + 12)
#define BAP_NAMES_64                                                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BAP_NAMES_128                                                                                            \
  BAP_NAMES_64                                                                                                   \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, "  \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, "    \
  "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, " \
  "%123, %124, %125, %126, %127"
// The sums are added to (a predicate that holds); neither operand is negated, both are transposed or none.
#define BAP_PRODUCT(columns, type, names, a, b, transposed)                                      \
  "{\n.reg .pred added;\nsetp.eq.u32 added, 0, 0;\n"                                             \
  "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" names "}, " a ", " b \
  ", added, 1, 1, " transposed ", " transposed ";\n}\n"

// One product of 64 rows and kColumns columns over a slice of depth; the operands' descriptors. Register c[j][2 h + e]
// of lane l of warp w: row 16 w + 8 h + l / 4, column 8 j + 2 (l mod 4) + e.
template <MathMode kMode, int kColumns, bool kTransposed = false>
__device__ __forceinline__ void multiply_group(float (&c)[kColumns / kMmaColumns][4], uint64_t a, uint64_t b) {
  constexpr bool kBFloat16 = kMode == MathMode::kBFloat16;
  static_assert(kBFloat16 || kMode == MathMode::kHalf, "16-bit products");
  static_assert(kColumns == 128 || (kColumns == 256 && !kTransposed), "128 columns, or 256");
  if constexpr (kTransposed && kBFloat16) {
    asm volatile(BAP_PRODUCT("128", "bf16", BAP_NAMES_64, "%64", "%65", "1") : BAP_SUMS_64(0) : "l"(a), "l"(b));
  } else if constexpr (kTransposed) {
    asm volatile(BAP_PRODUCT("128", "f16", BAP_NAMES_64, "%64", "%65", "1") : BAP_SUMS_64(0) : "l"(a), "l"(b));
  } else if constexpr (kColumns == 128 && kBFloat16) {
    asm volatile(BAP_PRODUCT("128", "bf16", BAP_NAMES_64, "%64", "%65", "0") : BAP_SUMS_64(0) : "l"(a), "l"(b));
  } else if constexpr (kColumns == 128) {
    asm volatile(BAP_PRODUCT("128", "f16", BAP_NAMES_64, "%64", "%65", "0") : BAP_SUMS_64(0) : "l"(a), "l"(b));
  } else if constexpr (kBFloat16) {
    asm volatile(BAP_PRODUCT("256", "bf16", BAP_NAMES_128, "%128", "%129", "0")
                 : BAP_SUMS_64(0), BAP_SUMS_64(16)
                 : "l"(a), "l"(b));
  } else {
    asm volatile(BAP_PRODUCT("256", "f16", BAP_NAMES_128, "%128", "%129", "0")
                 : BAP_SUMS_64(0), BAP_SUMS_64(16)
                 : "l"(a), "l"(b));
  }
}

#undef BAP_SUMS_4
#undef BAP_SUMS_16
#undef BAP_SUMS_64
#undef BAP_NAMES_64
#undef BAP_NAMES_128
#undef BAP_PRODUCT

}  // namespace bap_kernels
