// Candidates, clock and facts of a CUDA device for the measured choice.
#include "dispatch/route_cuda.h"

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>

#include "backends/aten/gathered_conv2d.h"
#include "dispatch/named_backend.h"

namespace bap_kernels {
namespace {

struct Facts {
  std::function<std::string(int64_t)> name;
  std::function<bool()> capturing;
};

// Never destroyed: it holds Python functions, and Python is gone before statics are.
Facts*& facts() {
  static Facts* known = nullptr;
  return known;
}

// What the device takes for a run, with the gaps in which it waits for the host.
double device_seconds(c10::Device device, c10::function_ref<void()> run) {
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

Place make_place(c10::Device device) {
  Place place;
  place.name = facts() != nullptr ? facts()->name(device.index()) : "GPU";
  place.id = place_id(place.name);
  place.may_measure = [] { return facts() != nullptr && !facts()->capturing(); };
  place.seconds = [device](Route, c10::function_ref<void()> run) { return device_seconds(device, run); };
  place.now = seconds_since_1970;
  return place;
}

}  // namespace

std::string auto_why_not(const std::string& backend, const std::vector<std::string>& shown) {
  const std::string reason = backend_why_not(backend);
  if (!reason.empty() || std::find(shown.begin(), shown.end(), backend) != shown.end()) return reason;
  return "no committed result from a GPU shows it right yet; use_backend(\"" + backend + "\") names it";
}

std::vector<Route> cuda_candidate_routes(const ConvCall& c, const std::vector<std::string>& shown) {
  std::vector<Route> routes = {Route::kGather};
  const bool last = c.format() == at::MemoryFormat::ChannelsLast;
  if (has_value(c.in_index) && last && c.input.is_contiguous(c.format())) routes.push_back(Route::kGatherFlat);
  if (dense_route_applies(c)) routes.push_back(Route::kMasked);
  // What this one does not cover it says when it is tried.
  if (auto_why_not("cuda", shown).empty()) routes.push_back(Route::kCuda);
  if (auto_why_not("triton", shown).empty() && triton_why_not(c).empty()) routes.push_back(Route::kTriton);
  return routes;
}

at::Tensor run_cuda_route(const ConvCall& c, Route route, const char* op) {
  switch (route) {
    case Route::kCuda:
      return cuda_backend.forward(c, op);
    case Route::kTriton:
      return triton_backend.forward(c, op);
    case Route::kGatherFlat:
      return aten_gathered_conv2d(c, AtenRoute::kGatherFlat);
    case Route::kMasked:
      return aten_gathered_conv2d(c, AtenRoute::kMasked);
    default:
      return aten_gathered_conv2d(c, AtenRoute::kGather);
  }
}

void set_cuda_facts(std::function<std::string(int64_t)> name, std::function<bool()> capturing) {
  facts() = new Facts{std::move(name), std::move(capturing)};
}

const Place& place_of(const at::Tensor& input) {
  if (!input.is_cuda()) return cpu_place();
  static std::mutex mutex;
  static auto* places = new std::unordered_map<c10::DeviceIndex, Place>();
  {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = places->find(input.get_device());
    if (found != places->end()) return found->second;
  }
  // Outside the lock: it asks Python, whose lock another thread may hold while it waits for this one.
  Place made = make_place(input.device());
  std::lock_guard<std::mutex> lock(mutex);
  return places->emplace(input.get_device(), std::move(made)).first->second;
}

}  // namespace bap_kernels
