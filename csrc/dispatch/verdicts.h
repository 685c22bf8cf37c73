// Verdicts on kernel families, one table for each GPU: which kernels have been found to compute rightly there. `auto`
// runs a kernel of an opt-in backend only where every family of the call has the verdict `ok` on the call's device.
//
// A family is `<backend>/<kernel>/<math>`. What a call needs:
//   cuda    a forward: the kernel of its route (nhwc, wgmma, planar, halo), and pack where channels are copied into a
//           compact tensor before it or spread from one after it, and split where sums are cut into parts. A backward:
//           input_gradient and the kernels that the gradient runs as a forward (wgmma, planar, nhwc; split),
//           weight_gradient or wgmma_weight_gradient, and pack. A switched convolution or a mixed batch: switched or
//           mixed, and what its forward or backward needs.
//   triton  likewise, with `forward` for nhwc, wgmma and halo.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace bap_kernels {

// What tensor cores multiply. `float32` is IEEE, which only Triton has.
enum class FamilyMath : int { kFloat32, kTf32, kFloat16, kBFloat16 };
enum class CudaKernel : int {
  kNhwc,
  kWgmma,
  kPlanar,
  kHalo,
  kSplit,
  kPack,
  kInputGradient,
  kWeightGradient,
  kWgmmaWeightGradient,
  kSwitched,
  kMixed
};
constexpr int kCudaKernelCount = 11;
enum class TritonKernel : int { kForward, kPlanar, kPack, kInputGradient, kWeightGradient, kSwitched, kMixed };
constexpr int kTritonKernelCount = 7;

// A set of families: a bit each, and one for what has no name here, which no verdict covers.
using FamilySet = uint64_t;
constexpr FamilySet kUnknownFamily = FamilySet{1} << 63;

// The math mode of a tensor's dtype; of float32 by the user's setting for convolutions.
FamilyMath math_of(const at::Tensor& t);

FamilySet family(CudaKernel kernel, FamilyMath math);
FamilySet family(TritonKernel kernel, FamilyMath math);
// All families of a backend in a math mode.
FamilySet cuda_families_of(FamilyMath math);
FamilySet triton_families_of(FamilyMath math);
// kUnknownFamily for a name that is none.
FamilySet family_of(const std::string& name);
FamilySet families_of(const std::vector<std::string>& names);
// In the order of the backends and of their kernels.
std::vector<std::string> family_names(FamilySet families);

// What the verifier says of a family: one of `ok`, `wrong`, `crash`, `hang` and `unknown`, and why.
using Verdict = std::pair<std::string, std::string>;
using VerdictTable = std::map<std::string, Verdict>;

class Verdicts {
 public:
  static Verdicts& instance();

  // Replaces the table of a device. Families that have no name here are kept, and cover no call. ValueError where the
  // device has no place or a verdict is none of the five.
  void set(int64_t device, VerdictTable table);
  VerdictTable get(int64_t device);

  // The families of a device that are `ok`; none where there is no table.
  FamilySet ok(int64_t device) const;
  // Grows whenever the device's table is replaced.
  uint64_t generation(int64_t device) const;
  // Why the families do not all cover a call on the device, by the first that does not; empty if they do.
  std::string problem(int64_t device, FamilySet families);

  // The verifier: called once for each device of a process, by the first call of `auto` there that may be measured. It
  // returns at once, or when the verdicts are there. Of an exception remains one warning. A new hook is called anew.
  void set_hook(std::function<void(int64_t)> hook);
  // Precondition: the caller holds no lock of ours.
  void ask(int64_t device, const std::function<bool()>& may_measure);

 private:
  static constexpr int64_t kMostDevices = 128;
  struct Device {
    std::atomic<FamilySet> ok = 0;
    std::atomic<uint64_t> generation = 0;
    std::atomic<bool> asked = false;
    VerdictTable table;  // under the lock
  };

  const Device* find(int64_t device) const;

  std::mutex mutex_;
  std::array<Device, kMostDevices> devices_;
  std::atomic<bool> has_hook_ = false;
  std::shared_ptr<const std::function<void(int64_t)>> hook_;  // under the lock
};

}  // namespace bap_kernels
