// The executor's C interface, for ctypes.
#include <cstring>

#include "block.h"

namespace {

ptx::GlobalMemory& memory() {
  static ptx::GlobalMemory global;
  return global;
}

void tell(const std::string& text, char* to, int64_t size) {
  const size_t length = std::min<size_t>(text.size(), static_cast<size_t>(size) - 1);
  std::memcpy(to, text.data(), length);
  to[length] = 0;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// A module of PTX text, or null with the reason in `error`.
void* ptx_parse(const char* text, char* error, int64_t size) {
  try {
    return new ptx::Module(ptx::parse(text));
  } catch (const std::exception& fault) {
    tell(fault.what(), error, size);
    return nullptr;
  }
}
void ptx_free(void* module) { delete static_cast<ptx::Module*>(module); }

// Names of kernels, one a line, each with its threads (0: not said) and its parameters as offset:bytes.
void ptx_describe(void* module, char* to, int64_t size) {
  std::string text;
  for (const ptx::Kernel& kernel : static_cast<ptx::Module*>(module)->kernels) {
    text += kernel.name + " " + std::to_string(kernel.threads);
    for (const ptx::Parameter& p : kernel.parameters) {
      text += " " + std::to_string(p.offset) + ":" + std::to_string(p.bytes);
    }
    text += "\n";
  }
  tell(text, to, size);
}
void ptx_spellings(char* to, int64_t size) {
  std::string text;
  for (const std::string& name : ptx::known_spellings()) text += name + "\n";
  tell(text, to, size);
}

void ptx_add_tensor(uint64_t begin, uint64_t bytes) { memory().add(begin, bytes); }
void ptx_clear_tensors() { memory().clear(); }

// 0, or 1 with the reason in `error`. flags: 1 sums are truncated, 2 registers without a value may be read, 4 shared
// memory that nothing has written may be read.
int ptx_launch(void* module, const char* kernel, const int* grid, int threads, int64_t shared_bytes,
               const uint8_t* parameters, int64_t parameter_bytes, uint64_t seed, int flags, char* error,
               int64_t size) {
  try {
    ptx::Launch launch{};
    launch.kernel = &static_cast<ptx::Module*>(module)->kernel(kernel);
    std::memcpy(launch.grid, grid, sizeof launch.grid);
    launch.threads = threads;
    launch.shared_bytes = shared_bytes;
    launch.parameters.assign(parameters, parameters + parameter_bytes);
    launch.options.seed = seed;
    launch.options.truncate = flags & 1;
    launch.options.check_undefined = !(flags & 2);
    launch.options.check_uninitialised = !(flags & 4);
    launch.global = &memory();
    ptx::run(launch);
    return 0;
  } catch (const std::exception& fault) {
    tell(fault.what(), error, size);
    return 1;
  }
}
}
#pragma GCC visibility pop
