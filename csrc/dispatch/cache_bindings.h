// The parts of dispatch that backends in Python use, and what tests use to follow them without a GPU.
#pragma once

#include <pybind11/pybind11.h>

namespace bap_kernels {

void bind_device_caches(pybind11::module_& m);

}  // namespace bap_kernels
