// A stand-in for the CUDA runtime library: what the launchers of csrc/backends/cuda/kernels call, on no device.
#pragma once

#include <string>
#include <vector>

#include "../executor/block.h"

namespace ptx {

struct Runtime {
  int arch = 80;     // 80 or 90: which PTX is executed
  int sm_count = 1;  // few make large tiles, many small ones
  Options options;
  GlobalMemory memory;
  std::vector<std::string> launches;  // mangled names, in order
};

Runtime& runtime();
// The PTX of the one kernel whose mangled name contains all of `parts`.
std::string kernel_text(const std::vector<std::string>& parts);
// Executes other text in its place, until `restore_kernels`.
void replace_kernel(const std::vector<std::string>& parts, const std::string& text);
void restore_kernels();
// Mangled names of all kernels for the runtime's architecture.
std::vector<std::string> kernel_names();

}  // namespace ptx
