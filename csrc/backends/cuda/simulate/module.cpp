// Python module of the simulation, in place of bap_kernels._C_cuda: the same table of launches, and functions by which
// tests set the device up, see what was launched on it, and launch a kernel by itself.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "backends/cuda/kernels/launcher.h"
#include "backends/cuda/simulate/device.h"

namespace py = pybind11;

namespace bap_kernels {
namespace {

void set_device(int sm_count, bool warpgroups) {
  simulated_device().sm_count = sm_count;
  simulated_device().warpgroups = warpgroups;
}

std::vector<std::string> take_launches() { return std::exchange(simulated_device().launches, {}); }

// Spreads a dense (N, H, W, padded) tensor over the channels of (N, C, H, W); tensors by address, sizes and strides.
void unpack(uintptr_t result, std::array<int64_t, 4> sizes, std::array<int64_t, 4> strides, uintptr_t source,
            int padded, int element_bytes, uintptr_t list, int block, int depth, uintptr_t used) {
  ChannelUnpackParams p{};
  p.source = reinterpret_cast<const void*>(source);
  p.result = reinterpret_cast<void*>(result);
  p.result_stride = {strides[0], strides[1], strides[2], strides[3]};
  p.list = {reinterpret_cast<const int32_t*>(list), block};
  p.depth = depth;
  p.used = reinterpret_cast<const int32_t*>(used);
  p.batch = static_cast<int>(sizes[0]);
  p.channels = static_cast<int>(sizes[1]);
  p.height = static_cast<int>(sizes[2]);
  p.width = static_cast<int>(sizes[3]);
  p.padded = padded;
  const bool dense = strides[3] == 1 && strides[2] == sizes[3];
  const int64_t vector = kChunkBytes / element_bytes;
  p.result_vector = dense && result % kChunkBytes == 0 && strides[0] % vector == 0 && strides[1] % vector == 0 &&
                    sizes[2] * sizes[3] % vector == 0;
  launch_channel_unpack(p, element_bytes == 2 ? MathMode::kBFloat16 : MathMode::kTf32, nullptr);
}

py::capsule launcher_of_other_sources() {
  static CudaLauncher other = linked_launcher();
  ++other.layout;
  return py::capsule(&other, kLauncherCapsule);
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.attr("launcher") = py::capsule(&linked_launcher(), kLauncherCapsule);
  m.def("set_device", &set_device, py::arg("sm_count") = 1, py::arg("warpgroups") = false);
  m.def("take_launches", &take_launches);
  m.def("unpack", &unpack);
  m.def("launcher_of_other_sources", &launcher_of_other_sources);
}

}  // namespace bap_kernels
