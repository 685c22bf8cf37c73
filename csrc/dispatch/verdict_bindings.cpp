// See verdict_bindings.h.
#include "dispatch/verdict_bindings.h"

#include <ATen/core/boxing/KernelFunction.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>

#include <deque>

#include "dispatch/backend.h"
#include "dispatch/gathered_conv2d.h"
#include "dispatch/measured_device.h"

namespace py = pybind11;

namespace bap_kernels {
namespace {

using Names = std::vector<std::string>;

// The families of a call by every backend that can run it here and has families.
template <class Call>
Names names_of(const Call& call, FamilySet (*Backend::*families)(const Call&)) {
  Names names;
  if (call.shape.trivial()) return names;
  for (const BackendId id : {BackendId::kCuda, BackendId::kTriton}) {
    const Backend& own = backend(id);
    if (!own.unavailable_reason().empty()) continue;
    const Names more = family_names((own.*families)(call));
    names.insert(names.end(), more.begin(), more.end());
  }
  return names;
}

Names forward(const GatheredConv2dArgs<int64_t>& a) {
  const ConvCall call{{a, {}, a.cache_packed}, check_conv<int64_t>("call_families", a)};
  return names_of(call, &Backend::forward_families);
}

Names fused(const GatheredConv2dFusedArgs<int64_t>& a) {
  const ConvCall call{a, check_gathered_conv2d_fused<int64_t>("call_families", a)};
  return names_of(call, &Backend::forward_families);
}

Names backward(const GatheredConv2dBackwardArgs<int64_t>& a) {
  const ConvBackwardCall call{a, check_gathered_conv2d_backward<int64_t>("call_families", a)};
  return names_of(call, &Backend::backward_families);
}

Names switched(const SwitchedConv2dArgs<int64_t>& a) {
  const SwitchedCall call{a, check_switched_conv2d<int64_t>("call_families", a)};
  return names_of(call, &Backend::switched_families);
}

Names switched_backward(const SwitchedConv2dBackwardArgs<int64_t>& a) {
  const SwitchedBackwardCall call{a, check_switched_conv2d_backward<int64_t>("call_families", a)};
  return names_of(call, &Backend::switched_backward_families);
}

Names mixed(const GatheredConv2dMixedArgs<int64_t>& a) {
  MixedCall call{a, check_gathered_conv2d_mixed<int64_t>("call_families", a)};
  const auto& s = call.shape;
  call.output = at::empty({s.batch, s.channels_out, s.out_h, s.out_w},
                          a.input.options().memory_format(a.input.suggest_memory_format()));
  int64_t first = 0;
  std::deque<OptionalTensor> lists;
  for (size_t i = 0; i < a.counts.size(); ++i) {
    const int64_t count = a.counts[i];
    lists.push_back(a.in_indices.get(i));
    if (count > 0) {
      call.runs.push_back({{}, {}, lists.back(), first, count});
      call.cut(call.runs.back());
    }
    first += count;
  }
  return names_of(call, &Backend::mixed_families);
}

// Calls `kFunction`, a function of Op::Args<int64_t>, with Python's arguments of the op.
template <class Op, auto kFunction>
Names call_with(const py::tuple& args) {
  using Args = typename Op::template Args<int64_t>;
  using Function = detail::FlatFunction<Names, decltype(std::declval<const Args&>().tie())>;
  const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow((std::string("bap_kernels::") + Op::kName).c_str(), "");
  torch::jit::Stack stack =
      torch::jit::createStackForSchema(op.schema(), torch::jit::tuple_slice(args), py::kwargs(), /*self=*/std::nullopt);
  py::gil_scoped_release no_gil;
  auto kernel = c10::KernelFunction::makeFromUnboxedRuntimeFunction(&Function::template call<Args, kFunction>);
  kernel.callBoxed(op, c10::DispatchKeySet(), &stack);
  return stack.at(0).to<Names>();
}

Names call_families(const std::string& op, const py::tuple& args) {
  struct Row {
    const char* name;
    Names (*call)(const py::tuple&);
  };
  constexpr Row kRows[] = {
      {GatheredConv2d::kName, call_with<GatheredConv2d, forward>},
      {GatheredConv2dFused::kName, call_with<GatheredConv2dFused, fused>},
      {GatheredConv2dBackward::kName, call_with<GatheredConv2dBackward, backward>},
      {GatheredConv2dMixed::kName, call_with<GatheredConv2dMixed, mixed>},
      {SwitchedConv2d::kName, call_with<SwitchedConv2d, switched>},
      {SwitchedConv2dBackward::kName, call_with<SwitchedConv2dBackward, switched_backward>},
  };
  std::string known;
  for (const Row& row : kRows) {
    if (op == row.name) return row.call(args);
    known += (known.empty() ? "" : ", ") + std::string(row.name);
  }
  TORCH_CHECK_VALUE(false, "call_families(): expected `op` to be one of ", known, ", got ", op, ".");
}

using Seconds = std::function<double(const std::string&)>;

// Makes `auto` in the calling thread choose as on a GPU of a name and number, whatever device the tensors are on: its
// candidates are run, and `seconds` says what each of them took. `ran` is called with each candidate that is run
// because it was chosen. With `families`, by the name of a backend, ATen computes in place of the opt-in backends, and
// those are the families of all of their calls. Without a name that ends.
void simulate_gpu(const std::optional<std::string>& name, const Seconds& seconds, int64_t number,
                  const std::function<bool()>& capturing, const std::function<double()>& now, bool first_run_tells,
                  const std::function<void(const std::string&)>& ran,
                  const std::optional<std::map<std::string, Names>>& families) {
  if (!name) return set_simulated_gpu(nullptr);
  MeasuredDevice gpu;
  gpu.name = *name;
  gpu.id = device_id(*name);
  gpu.number = number;
  gpu.may_measure = [capturing] { return !capturing || !capturing(); };
  gpu.seconds = [seconds](Candidate candidate, c10::function_ref<void()> run) {
    run();
    return seconds ? seconds(candidate_name(candidate)) : 1e-3;
  };
  gpu.now = now ? now : seconds_since_1970;
  gpu.first_run_tells = first_run_tells;
  if (ran) gpu.ran = [ran](Candidate candidate) { ran(candidate_name(candidate)); };
  if (families) {
    gpu.stand_ins.emplace();
    gpu.stand_ins->fill(kUnknownFamily);
    for (const BackendId id : {BackendId::kCuda, BackendId::kTriton}) {
      const auto own = families->find(backend(id).name);
      if (own != families->end()) (*gpu.stand_ins)[static_cast<int>(id)] = families_of(own->second);
    }
  }
  set_simulated_gpu(std::make_unique<MeasuredDevice>(std::move(gpu)));
}

}  // namespace

void bind_verdicts(py::module_& m) {
  m.def(
      "set_verdicts",
      [](int64_t device, VerdictTable verdicts) { Verdicts::instance().set(device, std::move(verdicts)); },
      py::arg("device"), py::arg("verdicts"));
  m.def("verdicts", [](int64_t device) { return Verdicts::instance().get(device); }, py::arg("device"));
  m.def(
      "set_verify_hook", [](std::function<void(int64_t)> hook) { Verdicts::instance().set_hook(std::move(hook)); },
      py::arg("hook"));
  m.def("simulate_gpu", &simulate_gpu, py::arg("name"), py::arg("seconds") = Seconds(), py::arg("number") = 0,
        py::arg("capturing") = std::function<bool()>(), py::arg("now") = std::function<double()>(),
        py::arg("first_run_tells") = false, py::arg("ran") = std::function<void(const std::string&)>(),
        py::arg("families") = std::optional<std::map<std::string, Names>>());
  m.def("call_families", &call_families, py::arg("op"), py::arg("args"));
}

}  // namespace bap_kernels
