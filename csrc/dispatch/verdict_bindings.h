// What Python's verifier sets and asks.
#pragma once

#include <pybind11/pybind11.h>

namespace bap_kernels {

void bind_verdicts(pybind11::module_& m);

}  // namespace bap_kernels
