// See step_run.h.
#include "plan/step_run.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "dispatch/backend.h"
#include "ops/plain_tensor.h"

namespace py = pybind11;

namespace bap_kernels {
namespace {

bool contains(const std::vector<size_t>& slots, size_t slot) {
  return std::find(slots.begin(), slots.end(), slot) != slots.end();
}

bool runs_native_kernels() {
  const std::string& name = get_backend();
  return name == "auto" || name == "heuristic" || name == "native";
}

}  // namespace

void StepRun::add(std::unique_ptr<const RunStep> step, const std::vector<size_t>& reads,
                  const std::vector<size_t>& writes, const std::vector<size_t>& freed) {
  for (const size_t slot : reads) {
    TORCH_CHECK_VALUE(slot < slots_ + parameters_.size(), "StepRun: expected slots below ", slots_, ", got ", slot,
                      ".");
    if (slot < slots_ && !contains(loaded_, slot) && !contains(stored_, slot) && !contains(emptied_, slot)) {
      loaded_.push_back(slot);
    }
  }
  for (const size_t slot : writes) {
    TORCH_CHECK_VALUE(slot < slots_, "StepRun: expected slots below ", slots_, ", got ", slot, ".");
    if (!contains(stored_, slot)) stored_.push_back(slot);
  }
  for (const size_t slot : freed) {
    TORCH_CHECK_VALUE(slot < slots_, "StepRun: expected slots below ", slots_, ", got ", slot, ".");
    stored_.erase(std::remove(stored_.begin(), stored_.end(), slot), stored_.end());
    if (contains(loaded_, slot)) emptied_.push_back(slot);
  }
  steps_.emplace_back(std::move(step), freed);
}

size_t StepRun::add_parameter(py::dict parameters, py::str name, bool optional) {
  parameters_.push_back({std::move(parameters), std::move(name), optional});
  return slots_ + parameters_.size() - 1;
}

bool StepRun::load(const py::list& env, Slots& slots) const {
  for (const size_t slot : loaded_) {
    PyObject* object = PyList_GET_ITEM(env.ptr(), static_cast<Py_ssize_t>(slot));
    if (!THPVariable_CheckTypeExact(Py_TYPE(object))) return false;
    const at::Tensor& x = THPVariable_Unpack(object);
    if (!is_plain_tensor(x) || x.dim() != 4) return false;
    slots[slot] = x;
  }
  for (size_t i = 0; i < parameters_.size(); ++i) {
    PyObject* object = PyDict_GetItemWithError(parameters_[i].table.ptr(), parameters_[i].name.ptr());
    if (object == nullptr) return false;
    if (object == Py_None && parameters_[i].optional) continue;
    if (!THPVariable_CheckTypeExact(Py_TYPE(object))) return false;
    const at::Tensor& w = THPVariable_Unpack(object);
    if (!is_plain_tensor(w)) return false;
    slots[slots_ + i] = w;
  }
  return true;
}

bool StepRun::run(const py::list& env) const {
  TORCH_CHECK_VALUE(env.size() == slots_, "StepRun: expected ", slots_, " slots, got ", env.size(), ".");
  if (!calls_are_plain() || at::impl::torch_function_mode_enabled() || !runs_native_kernels()) return false;
  Slots slots(slots_ + parameters_.size());
  if (!load(env, slots)) return false;
  for (const size_t slot : emptied_) env[slot] = py::none();
  {
    py::gil_scoped_release unlocked;
    for (const auto& [step, freed] : steps_) {
      (*step)(slots);
      for (const size_t slot : freed) slots[slot].reset();
    }
  }
  for (const size_t slot : stored_) {
    env[slot] =
        slots[slot].has_value() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(*slots[slot])) : py::none();
  }
  return true;
}

}  // namespace bap_kernels
