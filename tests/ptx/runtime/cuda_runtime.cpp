// The calls behind `kernel<<<...>>>` and the few others that our launchers make. PTX comes from the fat binaries that
// nvcc embedded, which have to be uncompressed; a launch is executed at once, on the host's memory. A Fault of the
// executor becomes a status whose text is the Fault's.
#include "cuda_runtime.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

namespace ptx {
namespace {

constexpr uint32_t kFatBinary = 0xba55ed50u;
constexpr int kFault = cudaErrorLaunchFailure;
constexpr int kDefaultShared = 48 * 1024;

struct FatBinary {
  std::map<int, std::string> texts;                // by architecture
  std::map<int, std::unique_ptr<Module>> modules;  // parsed
};

struct Entry {
  FatBinary* binary;
  std::string name;
  int shared_limit = kDefaultShared;
};

struct Call {
  dim3 grid, block;
  size_t shared_bytes;
  void* stream;
};

struct Tables {
  std::vector<std::unique_ptr<FatBinary>> binaries;
  std::map<const void*, Entry> functions;
  std::map<std::string, std::unique_ptr<Module>> replaced;  // by mangled name
  std::vector<Call> calls;
  int last_error = cudaSuccess;
  std::string fault;
};

Tables& tables() {
  static Tables made;
  return made;
}

int fail(int status) { return tables().last_error = status; }

const Kernel& kernel_of(Entry& function) {
  if (const auto found = tables().replaced.find(function.name); found != tables().replaced.end()) {
    return found->second->kernel(function.name);
  }
  const int arch = runtime().arch;
  auto& module = function.binary->modules[arch];
  if (module == nullptr) {
    const auto text = function.binary->texts.find(arch);
    if (text == function.binary->texts.end()) throw Fault("no PTX for sm_" + std::to_string(arch));
    module = std::make_unique<Module>(parse(text->second));
  }
  return module->kernel(function.name);
}

// The device's PTX from `.visible .entry name` to the next one, with what stands before the first.
std::string text_of(const Entry& function) {
  const std::string& all = function.binary->texts.at(runtime().arch);
  const std::string start = ".visible .entry ";
  const size_t first = all.find(start), from = all.find(start + function.name + "(");
  if (from == std::string::npos) throw Fault("no kernel " + function.name);
  return all.substr(0, first) + all.substr(from, all.find(start, from + 1) - from);
}

Entry& only_one(const std::vector<std::string>& parts) {
  Entry* found = nullptr;
  for (auto& [address, function] : tables().functions) {
    const bool fits = std::all_of(parts.begin(), parts.end(), [&](const std::string& part) {
      return function.name.find(part) != std::string::npos;
    });
    if (!fits) continue;
    if (found != nullptr) throw Fault("several kernels have these parts in their names");
    found = &function;
  }
  if (found == nullptr) throw Fault("no kernel has these parts in its name");
  return *found;
}

int launch(Entry& function, dim3 grid, dim3 block, void** arguments, size_t shared_bytes) {
  try {
    const Kernel& kernel = kernel_of(function);
    runtime().launches.push_back(function.name);
    const auto threads = static_cast<int>(block.x * block.y * block.z);
    if (threads > 1024 || (kernel.threads > 0 && threads > kernel.threads) || grid.x == 0 || grid.y > 65535) {
      return fail(cudaErrorInvalidConfiguration);
    }
    if (static_cast<int>(shared_bytes) > function.shared_limit) return fail(cudaErrorInvalidValue);
    Launch l{};
    l.kernel = &kernel;
    l.grid[0] = static_cast<int>(grid.x), l.grid[1] = static_cast<int>(grid.y), l.grid[2] = static_cast<int>(grid.z);
    l.threads = threads;
    l.shared_bytes = static_cast<int64_t>(shared_bytes);
    l.options = runtime().options;
    l.global = &runtime().memory;
    l.parameters.resize(kernel.parameter_bytes);
    for (size_t i = 0; i < kernel.parameters.size(); ++i) {
      std::memcpy(&l.parameters[kernel.parameters[i].offset], arguments[i], kernel.parameters[i].bytes);
    }
    // What the launch may touch: the tensors that its arguments point into.
    std::vector<uint64_t> named;
    for (size_t at = 0; at + 8 <= l.parameters.size(); at += 8) {
      uint64_t address = 0;
      std::memcpy(&address, &l.parameters[at], 8);
      if (address != 0) named.push_back(address);
    }
    l.named = std::move(named);
    run(l);
    return cudaSuccess;
  } catch (const Fault& fault) {
    tables().fault = fault.what();
    return fail(kFault);
  }
}

}  // namespace

Runtime& runtime() {
  static Runtime made;
  return made;
}

std::string kernel_text(const std::vector<std::string>& parts) { return text_of(only_one(parts)); }

void replace_kernel(const std::vector<std::string>& parts, const std::string& text) {
  Entry& function = only_one(parts);
  tables().replaced[function.name] = std::make_unique<Module>(parse(text));
}

void restore_kernels() { tables().replaced.clear(); }

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const auto& [address, function] : tables().functions) names.push_back(function.name);
  return names;
}

}  // namespace ptx

// The library's own functions come before those of another runtime library in the process.
#pragma GCC visibility push(hidden)
extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  auto made = std::make_unique<ptx::FatBinary>();
  const uint8_t* at = nullptr;
  std::memcpy(&at, static_cast<uint8_t*>(wrapper) + 8, sizeof at);
  uint32_t magic = 0;
  uint16_t header = 0;
  uint64_t size = 0;
  std::memcpy(&magic, at, 4), std::memcpy(&header, at + 6, 2), std::memcpy(&size, at + 8, 8);
  if (magic != ptx::kFatBinary) std::abort();
  const uint8_t* end = at + header + size;
  for (at += header; at < end;) {
    uint16_t kind = 0;
    uint32_t entry_header = 0, arch = 0;
    uint64_t entry_size = 0;
    std::memcpy(&kind, at, 2), std::memcpy(&entry_header, at + 4, 4), std::memcpy(&entry_size, at + 8, 8);
    std::memcpy(&arch, at + 28, 4);
    // 1: PTX.
    if (kind == 1) {
      const auto* text = reinterpret_cast<const char*>(at + entry_header);
      made->texts[static_cast<int>(arch)] = std::string(text, strnlen(text, entry_size));
    }
    at += entry_header + entry_size;
  }
  ptx::tables().binaries.push_back(std::move(made));
  return reinterpret_cast<void**>(ptx::tables().binaries.back().get());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** binary, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  ptx::tables().functions[host] = {reinterpret_cast<ptx::FatBinary*>(binary), name};
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void* stream) {
  ptx::tables().calls.push_back({grid, block, shared_bytes, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  const ptx::Call call = ptx::tables().calls.back();
  ptx::tables().calls.pop_back();
  *grid = call.grid, *block = call.block, *shared_bytes = call.shared_bytes;
  *static_cast<void**>(stream) = call.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  const auto found = ptx::tables().functions.find(host);
  if (found == ptx::tables().functions.end()) return cudaErrorInvalidDeviceFunction;
  *kernel = reinterpret_cast<cudaKernel_t>(&found->second);
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                               cudaStream_t) {
  return static_cast<cudaError_t>(
      ptx::launch(*reinterpret_cast<ptx::Entry*>(kernel), grid, block, arguments, shared_bytes));
}
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  const auto found = ptx::tables().functions.find(host);
  if (found == ptx::tables().functions.end()) return cudaErrorInvalidDeviceFunction;
  return static_cast<cudaError_t>(ptx::launch(found->second, grid, block, arguments, shared_bytes));
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  const int most = (ptx::runtime().arch == 80 ? 163 : 227) * 1024;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > most) {
    return static_cast<cudaError_t>(ptx::fail(cudaErrorInvalidValue));
  }
  ptx::tables().functions.at(host).shared_limit = value;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* host) {
  try {
    *attributes = {};
    attributes->maxThreadsPerBlock = ptx::kernel_of(ptx::tables().functions.at(host)).threads;
    return cudaSuccess;
  } catch (const ptx::Fault& fault) {
    ptx::tables().fault = fault.what();
    return static_cast<cudaError_t>(ptx::fail(ptx::kFault));
  }
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMultiProcessorCount) {
    *value = ptx::runtime().sm_count;
  } else if (attribute == cudaDevAttrComputeCapabilityMajor) {
    *value = ptx::runtime().arch / 10;
  } else {
    return static_cast<cudaError_t>(ptx::fail(cudaErrorInvalidValue));
  }
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  return static_cast<cudaError_t>(std::exchange(ptx::tables().last_error, static_cast<int>(cudaSuccess)));
}
const char* cudaGetErrorString(cudaError_t status) {
  if (status == ptx::kFault) return ptx::tables().fault.c_str();
  return status == cudaSuccess ? "no error" : "the launch is not one that a device takes";
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
}
#pragma GCC visibility pop
