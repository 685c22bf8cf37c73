// See step_run.h.
#include "plan/step_run.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "dispatch/backend.h"
#include "ops/plain_tensor.h"
#include "plan/conv_step.h"

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
  steps_.push_back({std::move(step), reads, writes, freed});
  join_block();
}

// Expand, depthwise, project: what the first two leave is read by the next one alone. Steps between the last two, such
// as views of the residual, come first.
void StepRun::join_block() {
  const auto conv = [](const Entry& entry) { return dynamic_cast<const ConvStep*>(entry.step.get()); };
  const size_t end = steps_.size();
  const ConvStep* last = conv(steps_.back());
  if (last == nullptr) return;
  size_t middle = end - 1;
  while (middle > 0 && conv(steps_[middle - 1]) == nullptr) --middle;
  if (middle < 2) return;
  const ConvStep *depthwise = conv(steps_[--middle]), *first = conv(steps_[middle - 1]);
  const auto alone = [&](const ConvStep& step, size_t reader) {
    // Not as a residual, too.
    const auto& reads = steps_[reader].reads;
    const bool once = std::count(reads.begin(), reads.end(), step.out) == 1;
    return once && !step.second.has_value() && contains(steps_[reader].freed, step.out);
  };
  if (first == nullptr || depthwise->groups == 1 || first->out != depthwise->x || depthwise->out != last->x) return;
  if (!alone(*first, middle) || !alone(*depthwise, end - 1)) return;
  const auto append = [](std::vector<size_t>& all, const std::vector<size_t>& more) {
    all.insert(all.end(), more.begin(), more.end());
  };
  const auto meet = [](const std::vector<size_t>& some, const std::vector<size_t>& others) {
    return std::any_of(some.begin(), some.end(), [&](size_t slot) { return contains(others, slot); });
  };
  Entry block{nullptr, steps_[middle - 1].reads, steps_[middle - 1].writes, steps_[middle - 1].freed};
  append(block.reads, steps_[middle].reads);
  append(block.writes, steps_[middle].writes);
  for (size_t i = middle; i < end; ++i) {
    const Entry& entry = steps_[i];
    const bool between = i > middle && i + 1 < end;
    // It may move: it neither reads what the two write nor writes what they read or write.
    if (between && (meet(entry.reads, block.writes) || meet(entry.writes, block.reads))) return;
    // What was freed is freed later.
    if (i > middle && (meet(entry.writes, block.writes) || meet(entry.writes, block.freed))) return;
    append(block.freed, entry.freed);
  }
  append(block.reads, steps_.back().reads);
  append(block.writes, steps_.back().writes);
  const auto taken = [&](size_t i) {
    return std::unique_ptr<const ConvStep>(static_cast<const ConvStep*>(steps_[i].step.release()));
  };
  auto step = std::make_unique<BlockStep>();
  step->first = taken(middle - 1);
  step->depthwise = taken(middle);
  step->last = taken(end - 1);
  block.step = std::move(step);
  for (size_t i = middle + 1; i + 1 < end; ++i) steps_[i].freed.clear();
  steps_.back() = std::move(block);
  steps_.erase(steps_.begin() + static_cast<std::ptrdiff_t>(middle) - 1,
               steps_.begin() + static_cast<std::ptrdiff_t>(middle) + 1);
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
    for (const Entry& entry : steps_) {
      (*entry.step)(slots);
      for (const size_t slot : entry.freed) slots[slot].reset();
    }
  }
  for (const size_t slot : stored_) {
    env[slot] =
        slots[slot].has_value() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(*slots[slot])) : py::none();
  }
  return true;
}

}  // namespace bap_kernels
