// See verdicts.h.
#include "dispatch/verdicts.h"

#include <ATen/Context.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <exception>

#include "dispatch/python_hooks.h"

namespace bap_kernels {
namespace {

constexpr std::array<const char*, 4> kMath = {"float32", "tf32", "float16", "bfloat16"};
constexpr std::array<const char*, kCudaKernelCount> kCudaKernels = {
    "nhwc", "wgmma", "planar", "halo", "split", "pack", "input_gradient", "weight_gradient", "wgmma_weight_gradient",
    // Ops that need other families, too.
    "switched", "mixed"};
constexpr std::array<const char*, kTritonKernelCount> kTritonKernels = {
    "forward", "planar", "pack", "input_gradient", "weight_gradient", "switched", "mixed"};
constexpr std::array<const char*, 5> kWords = {"ok", "wrong", "crash", "hang", "unknown"};

constexpr int kMathCount = static_cast<int>(kMath.size());
// Without float32.
constexpr int kCudaMathCount = kMathCount - 1;
constexpr int kCudaBits = kCudaKernelCount * kCudaMathCount;
static_assert(kCudaBits + kTritonKernelCount * kMathCount < 63, "the last bit is that of kUnknownFamily");

const std::vector<std::string>& names() {
  static const auto* all = [] {
    auto* list = new std::vector<std::string>();
    for (const char* kernel : kCudaKernels) {
      for (int m = 1; m < kMathCount; ++m) list->push_back(std::string("cuda/") + kernel + "/" + kMath[m]);
    }
    for (const char* kernel : kTritonKernels) {
      for (const char* math : kMath) list->push_back(std::string("triton/") + kernel + "/" + math);
    }
    return list;
  }();
  return *all;
}

}  // namespace

FamilyMath math_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kBFloat16:
      return FamilyMath::kBFloat16;
    case at::kHalf:
      return FamilyMath::kFloat16;
    default:
      return at::globalContext().allowTF32CuDNN(at::Float32Op::CONV) ? FamilyMath::kTf32 : FamilyMath::kFloat32;
  }
}

FamilySet family(CudaKernel kernel, FamilyMath math) {
  if (math == FamilyMath::kFloat32) return kUnknownFamily;
  return FamilySet{1} << (static_cast<int>(kernel) * kCudaMathCount + static_cast<int>(math) - 1);
}

FamilySet family(TritonKernel kernel, FamilyMath math) {
  return FamilySet{1} << (kCudaBits + static_cast<int>(kernel) * kMathCount + static_cast<int>(math));
}

FamilySet cuda_families_of(FamilyMath math) {
  FamilySet all = 0;
  if (math == FamilyMath::kFloat32) return all;
  for (int k = 0; k < kCudaKernelCount; ++k) all |= family(static_cast<CudaKernel>(k), math);
  return all;
}

FamilySet triton_families_of(FamilyMath math) {
  FamilySet all = 0;
  for (int k = 0; k < kTritonKernelCount; ++k) all |= family(static_cast<TritonKernel>(k), math);
  return all;
}

FamilySet family_of(const std::string& name) {
  const auto place = std::find(names().begin(), names().end(), name);
  return place == names().end() ? kUnknownFamily : FamilySet{1} << (place - names().begin());
}

FamilySet families_of(const std::vector<std::string>& list) {
  FamilySet all = 0;
  for (const std::string& name : list) all |= family_of(name);
  return all;
}

std::vector<std::string> family_names(FamilySet families) {
  std::vector<std::string> list;
  for (size_t i = 0; i < names().size(); ++i) {
    if (families >> i & 1) list.push_back(names()[i]);
  }
  return list;
}

// Never destroyed: it holds a Python function, and Python is gone before statics are.
Verdicts& Verdicts::instance() {
  static auto* verdicts = new Verdicts();
  return *verdicts;
}

const Verdicts::Device* Verdicts::find(int64_t device) const {
  return device >= 0 && device < kMostDevices ? &devices_[device] : nullptr;
}

void Verdicts::set(int64_t device, VerdictTable table) {
  TORCH_CHECK_VALUE(find(device) != nullptr, "set_verdicts(): expected `device` to be from 0 to ", kMostDevices - 1,
                    ", got ", device, ".");
  FamilySet ok = 0;
  for (const auto& [name, verdict] : table) {
    TORCH_CHECK_VALUE(std::find(kWords.begin(), kWords.end(), verdict.first) != kWords.end(),
                      "set_verdicts(): expected the verdict of `", name,
                      "` to be ok, wrong, crash, hang or unknown, got ", verdict.first, ".");
    if (verdict.first == "ok") ok |= family_of(name);
  }
  Device& own = devices_[device];
  std::lock_guard<std::mutex> lock(mutex_);
  own.table = std::move(table);
  own.ok = ok & ~kUnknownFamily;
  ++own.generation;
}

VerdictTable Verdicts::get(int64_t device) {
  TORCH_CHECK_VALUE(find(device) != nullptr, "verdicts(): expected `device` to be from 0 to ", kMostDevices - 1,
                    ", got ", device, ".");
  std::lock_guard<std::mutex> lock(mutex_);
  return devices_[device].table;
}

FamilySet Verdicts::ok(int64_t device) const {
  const Device* own = find(device);
  return own == nullptr ? 0 : own->ok.load();
}

uint64_t Verdicts::generation(int64_t device) const {
  const Device* own = find(device);
  return own == nullptr ? 0 : own->generation.load();
}

std::string Verdicts::problem(int64_t device, FamilySet families) {
  const FamilySet missing = families & ~ok(device);
  if (missing == 0) return "";
  if ((missing & ~kUnknownFamily) == 0) return "a kernel without a name";
  const std::string name = family_names(missing).front();
  VerdictTable table;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (find(device) != nullptr) table = devices_[device].table;
  }
  const auto known = table.find(name);
  if (known == table.end()) return name + " is not verified on this GPU";
  const auto& [word, reason] = known->second;
  return name + ": " + word + (reason.empty() ? "" : ", " + reason);
}

void Verdicts::set_hook(std::function<void(int64_t)> hook) {
  auto given = hook ? std::make_shared<const std::function<void(int64_t)>>(std::move(hook)) : nullptr;
  {
    // No Python function is copied or dropped under the lock: that may wait for Python's.
    std::lock_guard<std::mutex> lock(mutex_);
    hook_.swap(given);
    has_hook_ = hook_ != nullptr;
    for (Device& device : devices_) device.asked = false;
  }
}

void Verdicts::ask(int64_t device, const std::function<bool()>& may_measure) {
  if (find(device) == nullptr || !has_hook_ || devices_[device].asked || !may_measure()) return;
  Device& own = devices_[device];
  if (own.asked.exchange(true)) return;
  std::shared_ptr<const std::function<void(int64_t)>> hook;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    hook = hook_;
  }
  if (hook == nullptr) return;
  try {
    (*hook)(device);
  } catch (...) {
    const std::exception_ptr error = std::current_exception();
    if (is_interrupt(error)) {
      own.asked = false;
      throw;
    }
    std::string text = "an unknown error";
    try {
      std::rethrow_exception(error);
    } catch (const std::exception& known) {
      text = known.what();
    } catch (...) {
    }
    warn("bap_kernels: the kernels of GPU " + std::to_string(device) +
         " could not be verified, so `auto` uses PyTorch's: " + text + ".");
  }
}

}  // namespace bap_kernels
