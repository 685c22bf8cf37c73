// The simulated device, as tests set it up, and what was launched on it.
#pragma once

#include <string>
#include <vector>

namespace bap_kernels {

struct SimulatedDevice {
  int sm_count = 1;  // few make large tiles, many small ones
  bool warpgroups = false;
  std::vector<std::string> launches;  // names of kernels, in order
};

inline SimulatedDevice& simulated_device() {
  static SimulatedDevice device;
  return device;
}

}  // namespace bap_kernels
