// Python module bap_kernels._C: importing it registers the ops; it also holds settings, tables and how it was built.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <cstring>
#include <string_view>

#include "backends/aten/convolution.h"
#include "backends/aten/gathered_conv2d.h"
#include "backends/aten/linear.h"
#include "backends/cpu/isa.h"
#include "backends/cpu/pooling.h"
#include "backends/cpu/tasks.h"
#include "backends/cuda/bindings.h"
#include "dispatch/automatic.h"
#include "dispatch/backend.h"
#include "dispatch/cache_bindings.h"
#include "dispatch/choice.h"
#include "dispatch/packed_cache.h"
#include "dispatch/packed_memory.h"
#include "dispatch/python_hooks.h"
#include "dispatch/verdict_bindings.h"
#include "dispatch/winograd.h"
#include "plan/bindings.h"

namespace py = pybind11;

namespace bap_kernels {
// So many integers, from a tuple or a list.
template <size_t kCount>
struct Integers {
  std::array<int64_t, kCount> values;

  std::array<c10::SymInt, kCount> symbolic() const {
    std::array<c10::SymInt, kCount> all;
    std::copy(values.begin(), values.end(), all.begin());
    return all;
  }
};
}  // namespace bap_kernels

template <size_t kCount>
struct pybind11::detail::type_caster<bap_kernels::Integers<kCount>> {
  PYBIND11_TYPE_CASTER(bap_kernels::Integers<kCount>, const_name("Sequence[int]"));

  // What is neither of them, or has other elements, is left to the generic conversion of torch.ops.
  bool load(handle source, bool /*convert*/) {
    PyObject* sequence = source.ptr();
    if (!PyTuple_Check(sequence) && !PyList_Check(sequence)) return false;
    if (PySequence_Fast_GET_SIZE(sequence) != static_cast<Py_ssize_t>(kCount)) return false;
    for (size_t i = 0; i < kCount; ++i) {
      PyObject* item = PySequence_Fast_ITEMS(sequence)[i];
      if (!PyLong_Check(item)) return false;
      value.values[i] = PyLong_AsLongLong(item);
      if (value.values[i] == -1 && PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        return false;
      }
    }
    return true;
  }
};

namespace bap_kernels {
namespace {

// An op by a direct call of the dispatcher: every key and mode below Python sees it, and converting plain integers is
// cheaper than the generic conversion of torch.ops, which costs more than a small convolution. `Rest` are the arguments
// behind those of every gathered convolution.
template <class Op, class Members = decltype(std::declval<typename Op::template Args<c10::SymInt>>().tie()),
          class Rest = std::make_index_sequence<std::tuple_size_v<Members> - 9>>
struct DirectCall;

template <class Op, class... T, size_t... kRest>
struct DirectCall<Op, std::tuple<const T&...>, std::index_sequence<kRest...>> {
  template <size_t kPlace>
  using Member = typename detail::Flat<std::tuple_element_t<9 + kPlace, std::tuple<T...>>>::type;

  static typename Op::Result run(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& in_index, const OptionalTensor& out_index,
                                 const Integers<2>& stride, const Integers<4>& padding, const Integers<2>& dilation,
                                 int64_t groups, Member<kRest>... rest) {
    const auto strides = stride.symbolic(), dilations = dilation.symbolic();
    const auto sides = padding.symbolic();
    return call<Op>({input, weight, bias, in_index, out_index, strides, sides, dilations, groups, rest...});
  }
};

py::dict choice_dict(const Choice& choice) {
  py::dict times;
  for (int r = 0; r < kCandidateCount; ++r) {
    if (choice.seconds[r] > 0) times[candidate_name(static_cast<Candidate>(r))] = choice.seconds[r] * 1e6;
  }
  py::dict d;
  d["case"] = choice.key;
  d["backend"] = candidate_name(choice.candidate);
  d["candidates"] = times;
  d["confidence"] = choice.confidence();
  d["margin"] = choice.margin();
  d["measurements"] = choice.measurements;
  d["settled"] = choice.settled(seconds_since_1970());
  return d;
}

py::list choices() {
  py::list list;
  for (const Choice& choice : ChoiceTable::instance().all()) list.append(choice_dict(choice));
  return list;
}

// A function of a gathered convolution's arguments for Python: pairs and sides are lists of integers, and what the
// function takes besides follows.
template <auto kFunction>
struct ConvFunction;

template <class Result, class... Rest, Result (*kFunction)(const ConvArgs<int64_t>&, Rest...)>
struct ConvFunction<kFunction> {
  static Result run(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& in_index, const OptionalTensor& out_index, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                    Rest... rest) {
    return kFunction({input, weight, bias, in_index, out_index, stride, padding, dilation, groups},
                     std::forward<Rest>(rest)...);
  }
};

template <auto kFunction, class... Rest>
void def_conv_function(py::module_& m, const char* name, const Rest&... rest) {
  m.def(name, &ConvFunction<kFunction>::run, py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("in_index"),
        py::arg("out_index"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"), rest...);
}

// What the op would do with these arguments, and why; nothing is measured.
py::dict explain(const ConvArgs<int64_t>& args, bool cache_packed) {
  const ConvCall call{{args, {}, cache_packed}, check_conv<int64_t>("explain", args)};
  py::dict result;
  const MeasuredDevice& device = measured_device(args.input);
  const std::string key = automatic_case_text(call, device);
  Choice known{};
  if (ChoiceTable::instance().find(key, known)) {
    result = choice_dict(known);
  } else {
    result["case"] = key;
    result["backend"] = py::none();  // not measured yet
    result["candidates"] = py::dict();
  }
  py::dict reasons;
  const std::string native = backend(BackendId::kNative).unsupported_reason(call);
  if (!native.empty()) reasons["native"] = native;
  for (const BackendId id : {BackendId::kTriton, BackendId::kCuda}) {
    const Backend& gpu = backend(id);
    reasons[gpu.name] = device.is_gpu() ? auto_excluded_reason(id, call, device) : gpu.unavailable_reason();
  }
  result["unsupported"] = reasons;
  result["packed"] = PackedCache::note(call);
  return result;
}

// The fused convolution by one of ATen's candidates, as on a GPU where `on_gpu` says so: a dispatch mode sees the calls
// without one.
at::Tensor run_aten(const ConvArgs<int64_t>& args, const OptionalTensor& in_scale, const OptionalTensor& in_shift,
                    bool in_relu, const OptionalTensor& out_scale, const OptionalTensor& out_shift,
                    const OptionalTensor& residual, bool out_relu, bool cache_packed, const std::string& candidate,
                    bool on_gpu, std::optional<double> out_max) {
  const Fusion fusion{in_scale, in_shift, in_relu, out_scale, out_shift, residual, out_relu};
  const GatheredConv2dFusedArgs<int64_t> all{args, fusion, cache_packed, kAbsent, kAbsent, out_max};
  const ConvCall call{all, check_gathered_conv2d_fused<int64_t>("run_aten", all)};
  const auto device = on_gpu ? c10::kCUDA : args.input.device().type();
  for (const Candidate known :
       {Candidate::kGather, Candidate::kGatherFlat, Candidate::kGatherPacked, Candidate::kDense, Candidate::kMasked}) {
    if (candidate != candidate_name(known)) continue;
    py::gil_scoped_release no_gil;
    return aten_gathered_conv2d(call, known, device);
  }
  TORCH_CHECK_VALUE(false, "run_aten(): expected `candidate` to be one of ATen's, got ", candidate, ".");
}

// Whether two tensors of one shape and dtype on the CPU hold the same bits.
bool same_values(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || !a.sizes().equals(b.sizes())) return false;
  const at::Tensor x = a.contiguous(), y = b.contiguous();
  return x.numel() == 0 || std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
}

// Whether Python would let `except Exception` pass it by. What torch has not taken from Python yet is taken, so that no
// error stays pending behind a result.
bool python_interrupt(const std::exception_ptr& error) {
  py::gil_scoped_acquire lock;
  try {
    std::rethrow_exception(error);
  } catch (py::error_already_set& raised) {
    return !raised.matches(PyExc_Exception);
  } catch (python_error& raised) {
    raised.persist();
    return raised.type == nullptr || PyErr_GivenExceptionMatches(raised.type, PyExc_Exception) == 0;
  } catch (...) {
    return false;
  }
}

void raise_interrupt() {
  py::gil_scoped_acquire lock;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void set_hooks(std::function<void(const std::string&)> issue) {
  set_python_hooks({std::move(issue), raise_interrupt, python_interrupt});
}

py::dict packed_cache_info() {
  const auto info = PackedCache::instance().info();
  py::dict d;
  d["bytes"] = info.bytes;
  d["entries"] = info.entries;
  d["limit_bytes"] = info.limit_bytes;
  d["hits"] = info.hits;
  d["misses"] = info.misses;
  d["evictions"] = info.evictions;
  d["compared"] = info.compared;
  d["not_kept"] = info.not_kept;
  d["pinned"] = info.pinned;
  return d;
}

// bap_kernels/_load.py looks for it in the file where the library does not load.
constexpr std::string_view kBuiltWith = "bap_kernels was built with torch " BAP_KERNELS_BUILD_TORCH;

// What is kept of a weight: (number, bytes, whether for these lists).
std::vector<std::tuple<uint64_t, int64_t, bool>> kept_packed(const at::Tensor& weight, const OptionalTensor& in_index,
                                                             const OptionalTensor& out_index,
                                                             const OptionalTensor& weight_index) {
  std::vector<std::tuple<uint64_t, int64_t, bool>> all;
  for (const auto& kept : PackedCache::instance().kept_of(weight, in_index, out_index, weight_index)) {
    all.emplace_back(kept.number, kept.bytes, kept.of_lists);
  }
  return all;
}

// The parallel regions of the native kernels in what a function runs in this thread: (grain, cycles of each task). The
// kernels compute nothing, so what was packed meanwhile is dropped.
std::vector<std::pair<int64_t, std::vector<double>>> record_tasks(const std::function<void()>& run) {
  std::vector<std::pair<int64_t, std::vector<double>>> regions;
  {
    TaskRecord record;
    run();
    for (TaskRegion& region : record.regions) regions.emplace_back(region.grain, std::move(region.cycles));
  }
  PackedCache::instance().clear();
  return regions;
}

// How the library was built.
py::dict build_info() {
  py::dict d;
  d["compiler"] = BAP_KERNELS_BUILD_COMPILER;
  d["flags"] = BAP_KERNELS_BUILD_FLAGS;
  d["isas"] = BAP_KERNELS_BUILD_ISAS;
  d["torch"] = kBuiltWith.substr(kBuiltWith.rfind(' ') + 1);
#if defined(_OPENMP)
  d["openmp"] = std::to_string(_OPENMP);
#else
  d["openmp"] = "none";
#endif
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  bind_cuda(m);
  bind_verdicts(m);
  bind_device_caches(m);
  bind_plan(m);
  bind_watch(m);
  m.doc() =
      "Native part of bap_kernels: registers the ops; settings, tables "
      "and how it was built.";
  m.def("gathered_conv2d", torch::wrap_pybind_function_no_gil(DirectCall<GatheredConv2d>::run));
  m.def("gathered_conv2d_fused", torch::wrap_pybind_function_no_gil(DirectCall<GatheredConv2dFused>::run));
  m.def("linear", &linear, py::arg("x"), py::arg("weight"), py::arg("bias"), py::call_guard<py::gil_scoped_release>());
  m.def("max_pool2d", &max_pool2d, py::arg("x"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("ceil_mode"), py::call_guard<py::gil_scoped_release>());
  m.def("avg_pool2d", &avg_pool2d, py::arg("x"), py::arg("kernel"), py::arg("stride"),
        py::call_guard<py::gil_scoped_release>());
  m.def("global_avg_pool2d", &global_avg_pool2d, py::arg("x"), py::call_guard<py::gil_scoped_release>());
  m.def("set_backend", &set_backend, py::arg("name"));
  m.def("get_backend", &get_backend);
  m.def("set_default_backend", &set_default_backend, py::arg("name"));
  m.def("set_winograd", &set_winograd, py::arg("allowed"));
  m.def("get_winograd", &get_winograd);
  m.def("set_default_winograd", &set_default_winograd, py::arg("allowed"));
  m.def("force_winograd", &force_winograd, py::arg("size"));
  m.def("forced_winograd", &forced_winograd);
  m.def(
      "set_warn", [](std::function<void(const std::string&)> issue) { set_hooks(std::move(issue)); }, py::arg("issue"));
  m.def(
      "unsupported_reason",
      [](const std::string& name) -> std::optional<std::string> {
        const std::string reason = backend_unavailable_reason(name);
        return reason.empty() ? std::nullopt : std::optional<std::string>(reason);
      },
      py::arg("backend"));
  m.def("set_unsupported_reason", &set_unavailable_reason, py::arg("reason"));
  m.def("isa", [] { return isa(); });
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("isa_available", &isa_available);
  m.def("cpu_model", &cpu_model);
  m.def("has_avx512_bf16", &isa_has_bfloat16_pairs);
  m.def("build_info", &build_info);
  def_conv_function<explain>(m, "explain", py::arg("cache_packed") = true);
  def_conv_function<run_aten>(
      m, "run_aten", py::arg("in_scale") = std::nullopt, py::arg("in_shift") = std::nullopt, py::arg("in_relu") = false,
      py::arg("out_scale") = std::nullopt, py::arg("out_shift") = std::nullopt, py::arg("residual") = std::nullopt,
      py::arg("out_relu") = false, py::arg("cache_packed") = true, py::arg("candidate") = "gather",
      py::arg("on_gpu") = false, py::arg("out_max") = std::nullopt);
  m.def("set_gpu_hooks", &set_gpu_hooks, py::arg("name"), py::arg("capturing"));
  m.def("choices", &choices);
  m.def("clear_choices", [] { ChoiceTable::instance().clear(); });
  m.def(
      "set_choice_file",
      [](const std::string& path, const std::string& problem) {
        ChoiceTable::instance().set_file(path, cpu_model() + "|" + isa() + "|torch " TORCH_VERSION, problem);
      },
      py::arg("path"), py::arg("problem") = "");
  m.def("choice_file_problem", [] { return ChoiceTable::instance().file_problem(); });
  m.def("set_choice_limit", [](int64_t cases) { ChoiceTable::instance().set_limit(cases); }, py::arg("cases"));
  m.def("packed_cache_info", &packed_cache_info);
  m.def("set_packed_cache_limit", [](int64_t bytes) { PackedCache::instance().set_limit(bytes); }, py::arg("bytes"));
  m.def("kept_packed", &kept_packed, py::arg("weight"), py::arg("in_index"), py::arg("out_index"),
        py::arg("weight_index"));
  m.def("record_tasks", &record_tasks, py::arg("run"));
  m.def("set_packed_memory", &set_packed_memory, py::arg("name"));
  m.def("get_packed_memory", &packed_memory_name);
  m.def("set_default_packed_memory", &set_default_packed_memory, py::arg("name"));
  m.def("clear_packed_cache", [] { PackedCache::instance().clear(); });
  m.def("same_values", &same_values, py::arg("a"), py::arg("b"));
  m.def(
      "convolution_fails",
      [](const at::Tensor& x, const at::Tensor& w, const std::vector<int64_t>& stride,
         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
        return convolution_fails(x, w, {stride, padding, dilation, groups},
                                 /*weight_gradient=*/false);
      },
      py::arg("input"), py::arg("weight"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
      py::arg("groups"));
  m.def(
      "convolution",
      [](const at::Tensor& x, const at::Tensor& w, const OptionalTensor& bias, const std::vector<int64_t>& stride,
         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
        py::gil_scoped_release no_gil;
        return convolution(x, w, bias, {stride, padding, dilation, groups});
      },
      py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
      py::arg("groups"));
  m.def("drop_packed", [](const at::Tensor& weight) { PackedCache::instance().drop(weight); }, py::arg("weight"));
}

}  // namespace bap_kernels
