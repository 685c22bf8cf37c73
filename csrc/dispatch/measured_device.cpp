// See measured_device.h.
#include "dispatch/measured_device.h"

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <chrono>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "dispatch/stream.h"

namespace bap_kernels {
namespace {

using DeviceName = std::function<std::string(int64_t)>;

// Never destroyed: it holds a Python function, and Python is gone before statics are.
DeviceName*& device_name() {
  static DeviceName* hook = nullptr;
  return hook;
}

double wall_seconds(c10::function_ref<void()> run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// What the device takes for a run, with the gaps in which it waits for the host.
double gpu_seconds(c10::Device device, c10::function_ref<void()> run) {
  const c10::impl::VirtualGuardImpl impl(device.type());
  const c10::Stream stream = impl.getStream(device);
  // The flag of events that know times.
  c10::Event start(device.type(), c10::EventFlag::BACKEND_DEFAULT), end(device.type(), c10::EventFlag::BACKEND_DEFAULT);
  start.record(stream);
  run();
  end.record(stream);
  end.synchronize();
  return start.elapsedTime(end) * 1e-3;
}

MeasuredDevice make_gpu(c10::Device device) {
  MeasuredDevice gpu;
  gpu.name = device_name() != nullptr ? (*device_name())(device.index()) : "GPU";
  gpu.id = device_id(gpu.name);
  gpu.may_measure = [device] { return device_name() != nullptr && !capturing(device); };
  gpu.seconds = [device](Candidate, c10::function_ref<void()> run) { return gpu_seconds(device, run); };
  gpu.now = seconds_since_1970;
  gpu.number = device.index();
  return gpu;
}

const MeasuredDevice& this_cpu() {
  static const auto* cpu =
      new MeasuredDevice{"",
                         0,
                         [] { return true; },
                         [](Candidate, c10::function_ref<void()> run) { return wall_seconds(run); },
                         seconds_since_1970,
                         /*first_run_tells=*/true};
  return *cpu;
}

// A plain pointer: a thread may end after Python, whose functions the device holds.
thread_local const MeasuredDevice* simulated_gpu = nullptr;

}  // namespace

void set_simulated_gpu(std::unique_ptr<const MeasuredDevice> gpu) {
  delete simulated_gpu;
  simulated_gpu = gpu.release();
}

double seconds_since_1970() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

int32_t device_id(const std::string& name) {
  return name.empty() ? 0 : static_cast<int32_t>(std::hash<std::string>()(name) | 1);
}

void set_gpu_hooks(std::function<std::string(int64_t)> name, std::function<bool()> capturing) {
  device_name() = new DeviceName(std::move(name));
  set_capturing_hook(std::move(capturing));
}

bool on_gpu(const at::Tensor& input) { return simulated_gpu != nullptr || input.is_cuda(); }

const MeasuredDevice& measured_device(const at::Tensor& input) {
  if (simulated_gpu != nullptr) return *simulated_gpu;
  if (!input.is_cuda()) return this_cpu();
  static std::mutex mutex;
  static auto* gpus = new std::unordered_map<c10::DeviceIndex, MeasuredDevice>();
  {
    std::lock_guard<std::mutex> lock(mutex);
    const auto known = gpus->find(input.get_device());
    if (known != gpus->end()) return known->second;
  }
  // Outside the lock: it asks Python, whose lock another thread may hold while it waits for this one.
  MeasuredDevice gpu = make_gpu(input.device());
  std::lock_guard<std::mutex> lock(mutex);
  return gpus->emplace(input.get_device(), std::move(gpu)).first->second;
}

}  // namespace bap_kernels
