// Python module in place of bap_kernels._C_cuda: the same launchers as nvcc compiled them, on the stand-in runtime, and
// functions by which tests set the device up and see what was launched. Its table says that it computes on CPU tensors.
//
// While it is loaded, CPU tensors get their memory here: filled with NaN, as far apart as a GPU's, and known to the
// executor, which lets a launch touch those that its arguments point into and no other memory.
#include <c10/core/CPUAllocator.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../../csrc/backends/cuda/kernels/launcher.h"
#include "cuda_runtime.h"

namespace py = pybind11;

namespace {

struct RecordingAllocator : c10::Allocator {
  static constexpr size_t kAlignment = 512;
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, c10::Device(c10::kCPU)};
    void* memory = std::aligned_alloc(kAlignment, (bytes / kAlignment + 2) * kAlignment);
    if (memory == nullptr) throw std::bad_alloc();
    std::memset(memory, 0xff, bytes);
    ptx::runtime().memory.add(reinterpret_cast<uint64_t>(memory), bytes);
    return {memory, memory, &release, c10::Device(c10::kCPU)};
  }
  static void release(void* memory) {
    if (memory == nullptr) return;
    ptx::runtime().memory.remove(reinterpret_cast<uint64_t>(memory));
    std::free(memory);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

void set_device(int sm_count, bool) { ptx::runtime().sm_count = sm_count; }

void set_options(uint64_t seed, bool truncate) {
  ptx::runtime().options.seed = seed;
  ptx::runtime().options.truncate = truncate;
}

std::vector<std::string> take_mangled() { return std::exchange(ptx::runtime().launches, {}); }

// Names as the simulation gives them.
std::vector<std::string> take_launches() {
  const std::pair<const char*, const char*> names[] = {
      {"GatheredConv2d", "gathered_conv2d"}, {"HaloConv2d", "halo_conv2d"},   {"WarpgroupConv2d", "warpgroup_conv2d"},
      {"WeightGradient", "weight_gradient"}, {"SumPartials", "sum_partials"}, {"ChannelPack", "channel_pack"},
      {"ChannelUnpack", "channel_unpack"}};
  std::vector<std::string> found;
  for (const std::string& mangled : take_mangled()) {
    for (const auto& [part, name] : names) {
      // Of "GatheredConv2d" in the middle of another name there is none.
      if (mangled.find(part) != std::string::npos) {
        found.emplace_back(name);
        break;
      }
    }
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  static RecordingAllocator allocator;
  c10::SetCPUAllocator(&allocator, 1);
  const char* arch = std::getenv("BAP_KERNELS_PTX_ARCH");
  ptx::runtime().arch = arch != nullptr && std::string(arch) == "90" ? 90 : 80;
  m.attr("arch") = ptx::runtime().arch;
  m.attr("launcher") = py::capsule(&bap_kernels::linked_launcher(), bap_kernels::kLauncherCapsule);
  m.def("set_device", &set_device, py::arg("sm_count") = 1, py::arg("warpgroups") = false);
  m.def("set_options", &set_options, py::arg("seed") = 0, py::arg("truncate") = false);
  m.def("take_launches", &take_launches);
  m.def("take_mangled", &take_mangled);
  m.def("kernel_names", &ptx::kernel_names);
  m.def("kernel_text", &ptx::kernel_text);
  m.def("replace_kernel", &ptx::replace_kernel);
  m.def("restore_kernels", &ptx::restore_kernels);
}
