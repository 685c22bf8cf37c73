// What the loader hands to the CUDA backend.
#pragma once

#include <pybind11/pybind11.h>

namespace bap_kernels {

void bind_cuda(pybind11::module_& m);

}  // namespace bap_kernels
