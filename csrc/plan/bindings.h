// What a plan in Python uses of this folder.
#pragma once

#include <pybind11/pybind11.h>

namespace bap_kernels {

void bind_plan(pybind11::module_& m);
void bind_watch(pybind11::module_& m);

}  // namespace bap_kernels
