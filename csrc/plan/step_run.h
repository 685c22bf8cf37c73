// Consecutive steps of a plan as one call: tensors go from step to step without Python, which another thread may use
// meanwhile.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <utility>
#include <vector>

#include "ops/op.h"

namespace bap_kernels {

// The tensors of a plan by their places; those that a step does not need are absent.
using Slots = std::vector<OptionalTensor>;

struct RunStep {
  virtual ~RunStep() = default;
  virtual void operator()(Slots& slots) const = 0;
};

// What one plan runs in a row. It is made once, and may then run in several threads at a time.
class StepRun {
 public:
  // Of a plan with so many slots.
  explicit StepRun(size_t slots) : slots_(slots) {}

  // Adds a step with the slots that it reads, that it writes, and that nothing reads after it.
  void add(std::unique_ptr<const RunStep> step, const std::vector<size_t>& reads, const std::vector<size_t>& writes,
           const std::vector<size_t>& freed);

  // The slot of an entry of a layer's parameters, read anew in each run; only an optional one may be None.
  size_t add_parameter(pybind11::dict parameters, pybind11::str name, bool optional);

  // Runs the steps on a plan's list of slots. False, and nothing has changed, where the steps themselves have to run:
  // for tensors that are no plain images on the CPU, for those of a subclass, which may have functions of its own,
  // under modes of PyTorch, and where a backend is named that is not `native`.
  bool run(const pybind11::list& env) const;

  // What Python's garbage collector has to know of.
  template <class Visit>
  void visit(const Visit& visit) const {
    for (const Parameter& parameter : parameters_) visit(parameter.table);
  }

 private:
  struct Parameter {
    pybind11::dict table;
    pybind11::str name;
    bool optional;
  };

  struct Entry {
    std::unique_ptr<const RunStep> step;
    std::vector<size_t> reads, writes, freed;
  };

  bool load(const pybind11::list& env, Slots& slots) const;
  // Makes one step of the last convolution and those before it, where they are a block.
  void join_block();

  size_t slots_;
  std::vector<Parameter> parameters_;  // their slots are behind those of the plan
  std::vector<Entry> steps_;
  std::vector<size_t> loaded_, stored_, emptied_;  // of the plan's slots: read before and left behind; read and freed
};

}  // namespace bap_kernels
