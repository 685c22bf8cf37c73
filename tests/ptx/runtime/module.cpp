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

int default_arch() {
  const char* arch = std::getenv("BAP_KERNELS_PTX_ARCH");
  return arch != nullptr && std::string(arch) == "90" ? 90 : 80;
}

// `arch`: 80 or 90; 0: that of the process.
void set_device(int sm_count, int arch) {
  ptx::runtime().sm_count = sm_count;
  ptx::runtime().arch = arch != 0 ? arch : default_arch();
}

// What the launchers find out about a device they may keep, so each architecture is a device of its own.
bool has_warpgroups(int) { return bap_kernels::has_warpgroups(ptx::runtime().arch == 80 ? 0 : 1); }

bap_kernels::CudaLauncher launcher_on_cpu() {
  bap_kernels::CudaLauncher table = bap_kernels::linked_launcher();
  table.simulated = true;
  table.has_warpgroups = has_warpgroups;
  return table;
}

py::capsule launcher() {
  static bap_kernels::CudaLauncher table = launcher_on_cpu();
  return py::capsule(&table, bap_kernels::kLauncherCapsule);
}

py::capsule launcher_of_other_sources() {
  static bap_kernels::CudaLauncher other = launcher_on_cpu();
  ++other.layout;
  return py::capsule(&other, bap_kernels::kLauncherCapsule);
}

// Spreads a dense (N, H, W, padded) tensor over the channels of (N, C, H, W); tensors by address, sizes and strides.
void unpack(uintptr_t result, std::array<int64_t, 4> sizes, std::array<int64_t, 4> strides, uintptr_t source,
            int padded, int mode, uintptr_t list, int block, int depth, uintptr_t used) {
  bap_kernels::ChannelUnpackParams p{};
  p.source = reinterpret_cast<const void*>(source);
  p.result = reinterpret_cast<void*>(result);
  p.result_stride = {strides[0], strides[1], strides[2], strides[3]};
  // Blocks have a power of two of channels.
  p.list = {reinterpret_cast<const int32_t*>(list), block, block > 0 ? __builtin_ctz(block) : 0};
  p.depth = depth;
  p.used = reinterpret_cast<const int32_t*>(used);
  p.batch = static_cast<int>(sizes[0]);
  p.channels = static_cast<int>(sizes[1]);
  p.height = static_cast<int>(sizes[2]);
  p.width = static_cast<int>(sizes[3]);
  p.padded = padded;
  const auto math = static_cast<bap_kernels::MathMode>(mode);
  const bool dense = strides[3] == 1 && strides[2] == sizes[3];
  const int64_t vector = bap_kernels::kChunkBytes / (math == bap_kernels::MathMode::kTf32 ? 4 : 2);
  p.result_vector = dense && result % bap_kernels::kChunkBytes == 0 && strides[0] % vector == 0 &&
                    strides[1] % vector == 0 && sizes[2] * sizes[3] % vector == 0;
  const bap_kernels::Status status = bap_kernels::launch_channel_unpack(p, math, nullptr);
  if (status != 0) throw std::runtime_error(bap_kernels::status_text(status));
}

void set_options(uint64_t seed, bool truncate) {
  ptx::runtime().options.seed = seed;
  ptx::runtime().options.truncate = truncate;
}

std::vector<std::string> take_mangled() { return std::exchange(ptx::runtime().launches, {}); }

// Names of the kernels, without their template arguments. Not of the one that lays weights out: for other kernels ATen
// does.
std::vector<std::string> take_launches() {
  std::vector<std::string> found;
  for (const std::string& mangled : take_mangled()) {
    for (const char* name :
         {"gathered_conv2d", "planar_conv2d", "halo_conv2d", "warpgroup_conv2d", "weight_gradient",
          "warpgroup_weight_gradient", "sum_partials", "split_epilogue", "channel_pack", "channel_unpack"}) {
      // With its length, as it is mangled: one name may end as another.
      const std::string kernel = name + std::string("_kernel");
      if (mangled.find(std::to_string(kernel.size()) + kernel) != std::string::npos) found.emplace_back(name);
    }
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  static RecordingAllocator allocator;
  c10::SetCPUAllocator(&allocator, 1);
  ptx::runtime().arch = default_arch();
  m.attr("arch") = default_arch();
  m.attr("launcher") = launcher();
  m.def("set_device", &set_device, py::arg("sm_count") = 1, py::arg("arch") = 0);
  m.def("unpack", &unpack);
  m.def("launcher_of_other_sources", &launcher_of_other_sources);
  m.def("set_options", &set_options, py::arg("seed") = 0, py::arg("truncate") = false);
  m.def("take_launches", &take_launches);
  m.def("take_mangled", &take_mangled);
  m.def("kernel_names", &ptx::kernel_names);
  m.def("kernel_text", &ptx::kernel_text);
  m.def("replace_kernel", &ptx::replace_kernel);
  m.def("restore_kernels", &ptx::restore_kernels);
}
