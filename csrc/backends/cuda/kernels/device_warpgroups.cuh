// The device as the block of a kernel of warpgroups: barriers in shared memory, registers that change hands, products
// of whole warpgroups. Compute capability 9.0a alone; see device_block.cuh.
#pragma once

#include "backends/cuda/kernels/device_block.cuh"
#include "backends/cuda/kernels/matrix_descriptor.h"

namespace bap_kernels {

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
// The sums are added to (a predicate that holds); neither operand is negated or transposed.
#define BAP_PRODUCT(columns, type, names, a, b)                                                  \
  "{\n.reg .pred added;\nsetp.eq.u32 added, 0, 0;\n"                                             \
  "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" names "}, " a ", " b \
  ", added, 1, 1, 0, 0;\n}\n"

template <class State>
class DeviceWarpgroups : public DeviceBlock<State> {
 public:
  // A swizzle is a matter of addresses, not of places in the block's memory.
  __device__ __forceinline__ DeviceWarpgroups() {
    if (this->shared_ % kGroupBytes != 0) __trap();
  }

  template <class Function>
  __device__ __forceinline__ void groups(Function&& function) {
    function(static_cast<int>(threadIdx.x) / kWarpgroup);
  }
  template <class Function>
  __device__ __forceinline__ void each_of_group(Function&& function) {
    this->each(function);
  }

  __device__ __forceinline__ void init_barrier(int at, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(this->shared_ + at), "r"(count) : "memory");
  }
  // Waits until the phase of this parity has been completed.
  __device__ __forceinline__ void wait_barrier(int at, int parity) {
    uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{\n.reg .pred done;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n}\n"
          : "=r"(done)
          : "r"(this->shared_ + at), "r"(parity)
          : "memory");
    }
  }
  // Every warp of the group arrives once.
  __device__ __forceinline__ void arrive(int at) {
    if (threadIdx.x % kWarp == 0) {
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(this->shared_ + at) : "memory");
    }
  }
  // The thread arrives when all copies that it has started are there.
  __device__ __forceinline__ void arrive_copies(int, int at) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(this->shared_ + at) : "memory");
  }
  __device__ __forceinline__ void finish_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
  // Products that begin after it see what the copies that were waited for have written.
  __device__ __forceinline__ void see_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
  template <int kCount>
  __device__ __forceinline__ void sync_groups() {
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

  // Before products are begun whose sums were written by other instructions.
  __device__ __forceinline__ void begin_products() {
    hold_sums();
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  }
  __device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
  template <int kLeft>
  __device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
    if constexpr (kLeft == 0) hold_sums();
  }
  // One product of the group's rows and kColumns columns over a slice of depth; the operands begin at these bytes.
  template <MathMode kMode, int kColumns>
  __device__ __forceinline__ void multiply_group(int rows_at, int columns_at) {
    const uint64_t a = matrix_descriptor(this->shared_ + rows_at), b = matrix_descriptor(this->shared_ + columns_at);
    float (&c)[kColumns / kMmaColumns][4] = this->state_.sums[0];
    constexpr bool kBFloat16 = kMode == MathMode::kBFloat16;
    static_assert(kBFloat16 || kMode == MathMode::kHalf, "16-bit products");
    if constexpr (kColumns == 128 && kBFloat16) {
      asm volatile(BAP_PRODUCT("128", "bf16", BAP_NAMES_64, "%64", "%65") : BAP_SUMS_64(0) : "l"(a), "l"(b));
    } else if constexpr (kColumns == 128) {
      asm volatile(BAP_PRODUCT("128", "f16", BAP_NAMES_64, "%64", "%65") : BAP_SUMS_64(0) : "l"(a), "l"(b));
    } else if constexpr (kBFloat16) {
      static_assert(kColumns == 256, "128 or 256 columns");
      asm volatile(BAP_PRODUCT("256", "bf16", BAP_NAMES_128, "%128", "%129")
                   : BAP_SUMS_64(0), BAP_SUMS_64(16)
                   : "l"(a), "l"(b));
    } else {
      static_assert(kColumns == 256, "128 or 256 columns");
      asm volatile(BAP_PRODUCT("256", "f16", BAP_NAMES_128, "%128", "%129")
                   : BAP_SUMS_64(0), BAP_SUMS_64(16)
                   : "l"(a), "l"(b));
    }
  }

 private:
  // Keeps the compiler from moving other uses of the sums across.
  __device__ __forceinline__ void hold_sums() {
    constexpr int kMmasN = sizeof(this->state_.sums[0]) / sizeof(this->state_.sums[0][0]);
    BAP_UNROLL
    for (int j = 0; j < kMmasN; ++j) {
      BAP_UNROLL
      for (int r = 0; r < 4; ++r) asm volatile("" : "+f"(this->state_.sums[0][j][r])::"memory");
    }
  }
};

#undef BAP_SUMS_4
#undef BAP_SUMS_16
#undef BAP_SUMS_64
#undef BAP_NAMES_64
#undef BAP_NAMES_128
#undef BAP_PRODUCT

}  // namespace bap_kernels
