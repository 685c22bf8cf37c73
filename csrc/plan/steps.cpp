// The steps that a run knows. Each does what the step of its name in bap_kernels/plan/steps.py does.
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/hardtanh.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <variant>

#include "backends/cpu/pooling.h"
#include "plan/bindings.h"
#include "plan/collector.h"
#include "plan/conv_step.h"
#include "plan/step_run.h"

namespace py = pybind11;

namespace bap_kernels {
namespace {

using Pair = std::array<int64_t, 2>;

// The members of ConvStep that Python gives by name.
void add_conv(StepRun& run, Slot x, OptionalSlot residual, Slot out, OptionalSlot second,
              const std::vector<Slot>& freed, py::dict parameters, const std::array<OptionalTensor, 4>& lists,
              const std::tuple<Pair, std::array<int64_t, 4>, Pair, int64_t>& options,
              const std::tuple<OptionalTensor, OptionalTensor, bool>& before,
              const std::tuple<OptionalTensor, OptionalTensor, bool>& after, std::optional<double> out_max,
              OptionalType type) {
  auto step = std::make_unique<ConvStep>();
  step->x = x;
  step->residual = residual;
  step->out = out;
  step->second = second;
  step->weight = run.add_parameter(parameters, py::str("weight"), /*optional=*/false);
  step->bias = run.add_parameter(parameters, py::str("bias"), /*optional=*/true);
  std::tie(step->in_index, step->out_index, step->weight_index, step->second_index) =
      std::tie(lists[0], lists[1], lists[2], lists[3]);
  const auto& [stride, padding, dilation, groups] = options;
  step->stride = stride;
  step->padding = padding;
  step->dilation = dilation;
  step->groups = groups;
  std::tie(step->in_scale, step->in_shift, step->in_relu) = before;
  std::tie(step->out_scale, step->out_shift, step->out_relu) = after;
  step->out_max = out_max;
  step->type = type;
  std::vector<Slot> reads{x, step->weight, step->bias}, writes{out};
  if (residual.has_value()) reads.push_back(*residual);
  if (second.has_value()) writes.push_back(*second);
  run.add(std::move(step), reads, writes, freed);
}

// A step of one tensor.
template <class Function>
struct Map : RunStep {
  Map(Slot x, Slot out, Function function) : x(x), out(out), function(std::move(function)) {}
  void operator()(Slots& slots) const override { slots[out] = function(*slots[x]); }
  Slot x, out;
  Function function;
};

template <class Function>
void add_map(StepRun& run, Slot x, Slot out, const std::vector<Slot>& freed, Function function) {
  run.add(std::make_unique<Map<Function>>(x, out, std::move(function)), {x}, {out}, freed);
}

void add_max_pool(StepRun& run, Slot x, Slot out, const std::vector<Slot>& freed, Pair kernel, Pair stride,
                  Pair padding, Pair dilation, bool ceil_mode) {
  add_map(run, x, out, freed,
          [=](const at::Tensor& t) { return max_pool2d(t, kernel, stride, padding, dilation, ceil_mode); });
}

void add_avg_pool(StepRun& run, Slot x, Slot out, const std::vector<Slot>& freed, Pair kernel, Pair stride) {
  add_map(run, x, out, freed, [=](const at::Tensor& t) { return avg_pool2d(t, kernel, stride); });
}

void add_global_avg_pool(StepRun& run, Slot x, Slot out, const std::vector<Slot>& freed) {
  add_map(run, x, out, freed, [](const at::Tensor& t) { return global_avg_pool2d(t); });
}

void add_contiguous(StepRun& run, Slot x, Slot out, const std::vector<Slot>& freed, at::MemoryFormat format) {
  add_map(run, x, out, freed, [=](const at::Tensor& t) { return t.contiguous(format); });
}

void add_view(StepRun& run, Slot x, Slot out, const std::vector<Slot>& freed, int64_t begin, int64_t count,
              OptionalType type) {
  add_map(run, x, out, freed, [=](const at::Tensor& t) { return converted(t.narrow(1, begin, count), type); });
}

at::Tensor selected(const at::Tensor& x, const at::Tensor& index) {
  // index_select of a channels_last tensor would lose its memory format.
  if (x.is_contiguous() || x.stride(1) != 1) return x.index_select(1, index);
  return x.permute({0, 2, 3, 1}).index_select(3, index).permute({0, 3, 1, 2});
}

// Constant channels: that many zeros, or those of a vector.
using Fill = std::variant<std::monostate, int64_t, at::Tensor>;

at::Tensor filled(const at::Tensor& x, const Fill& fill) {
  if (const auto* zeros = std::get_if<int64_t>(&fill)) return at::constant_pad_nd(x, {0, 0, 0, 0, 0, *zeros});
  const auto* values = std::get_if<at::Tensor>(&fill);
  if (values == nullptr) return x;
  const at::Tensor images = values->to(x.scalar_type()).view({1, -1, 1, 1});
  return at::cat({x, images.expand({x.size(0), -1, x.size(2), x.size(3)})}, 1);
}

void add_fetch(StepRun& run, Slot x, Slot out, const std::vector<Slot>& freed, const OptionalTensor& index,
               const Fill& fill, const OptionalTensor& order) {
  add_map(run, x, out, freed, [=](const at::Tensor& t) {
    const at::Tensor all = filled(has_value(index) ? selected(t, *index) : t, fill);
    return has_value(order) ? selected(all, *order) : all;
  });
}

void add_norm(StepRun& run, Slot x, Slot out, const std::vector<Slot>& freed,
              const std::array<OptionalTensor, 4>& vectors, double eps) {
  add_map(run, x, out, freed, [=](const at::Tensor& t) {
    return at::batch_norm(t, vectors[0], vectors[1], vectors[2], vectors[3], /*training=*/false, /*momentum=*/0, eps,
                          /*cudnn_enabled=*/false);
  });
}

// Over its input.
void add_relu(StepRun& run, Slot x, Slot out, const std::vector<Slot>& freed, std::optional<double> out_max) {
  add_map(run, x, out, freed,
          [=](at::Tensor t) { return out_max.has_value() ? at::hardtanh_(t, 0, *out_max) : t.relu_(); });
}

struct Cat : RunStep {
  std::vector<Slot> parts;
  Slot out;
  void operator()(Slots& slots) const override {
    std::vector<at::Tensor> tensors;
    for (const Slot part : parts) tensors.push_back(*slots[part]);
    slots[out] = at::cat(tensors, 1);
  }
};

void add_cat(StepRun& run, const std::vector<Slot>& parts, Slot out, const std::vector<Slot>& freed) {
  auto step = std::make_unique<Cat>();
  step->parts = parts;
  step->out = out;
  run.add(std::move(step), parts, {out}, freed);
}

struct Buffer : RunStep {
  std::vector<std::tuple<Slot, int64_t, int64_t>> parts;  // slot, first channel, channels
  Slot out;
  int64_t width;
  bool first;
  std::optional<int64_t> zeros_from;
  at::MemoryFormat format;
  OptionalType type;

  void operator()(Slots& slots) const override {
    if (first) {
      const at::Tensor& part = *slots[std::get<0>(parts.front())];
      at::Tensor buffer = at::empty({part.size(0), width, part.size(2), part.size(3)},
                                    part.options().dtype(type.value_or(part.scalar_type())).memory_format(format));
      if (zeros_from.has_value()) buffer.narrow(1, *zeros_from, width - *zeros_from).zero_();
      slots[out] = std::move(buffer);
    }
    for (const auto& [slot, begin, count] : parts) slots[out]->narrow(1, begin, count).copy_(*slots[slot]);
  }
};

void add_buffer(StepRun& run, const std::vector<std::tuple<Slot, int64_t, int64_t>>& parts, Slot out,
                const std::vector<Slot>& freed, int64_t width, bool first, std::optional<int64_t> zeros_from,
                at::MemoryFormat format, OptionalType type) {
  auto step = std::make_unique<Buffer>();
  step->parts = parts;
  step->out = out;
  step->width = width;
  step->first = first;
  step->zeros_from = zeros_from;
  step->format = format;
  step->type = type;
  std::vector<Slot> reads;
  for (const auto& part : parts) reads.push_back(std::get<0>(part));
  if (!first) reads.push_back(out);
  run.add(std::move(step), reads, {out}, freed);
}

}  // namespace

void bind_plan(py::module_& m) {
  const py::arg x("x"), out("out"), freed("freed"), kernel("kernel"), stride("stride"), padding("padding"),
      dilation("dilation"), dtype("dtype"), memory_format("memory_format"), parts("parts");
  py::class_<StepRun>(m, "StepRun", visited_by_collector<StepRun>())
      .def(py::init<size_t>(), py::arg("slots"))
      .def("add_conv", &add_conv, x, py::arg("residual"), out, py::arg("second"), freed, py::arg("parameters"),
           py::arg("lists"), py::arg("options"), py::arg("before"), py::arg("after"), py::arg("out_max"), dtype)
      .def("add_max_pool", &add_max_pool, x, out, freed, kernel, stride, padding, dilation, py::arg("ceil_mode"))
      .def("add_avg_pool", &add_avg_pool, x, out, freed, kernel, stride)
      .def("add_global_avg_pool", &add_global_avg_pool, x, out, freed)
      .def("add_contiguous", &add_contiguous, x, out, freed, memory_format)
      .def("add_view", &add_view, x, out, freed, py::arg("begin"), py::arg("count"), dtype)
      .def("add_fetch", &add_fetch, x, out, freed, py::arg("index"), py::arg("fill"), py::arg("order"))
      .def("add_norm", &add_norm, x, out, freed, py::arg("vectors"), py::arg("eps"))
      .def("add_relu", &add_relu, x, out, freed, py::arg("out_max"))
      .def("add_cat", &add_cat, parts, out, freed)
      .def("add_buffer", &add_buffer, parts, out, freed, py::arg("width"), py::arg("first"), py::arg("zeros_from"),
           memory_format, dtype)
      .def("run", &StepRun::run, py::arg("env"));
}

}  // namespace bap_kernels
