// See bindings.h.
#include "backends/cuda/bindings.h"

#include <pybind11/stl.h>

#include "backends/cuda/families.h"
#include "backends/cuda/launches.h"

namespace bap_kernels {

void bind_cuda(pybind11::module_& m) {
  m.def(
      "set_cuda_launcher",
      [](const pybind11::capsule& table) {
        set_cuda_launcher(table.get_pointer<const CudaLauncher>());
        return cuda_launcher()->simulated;
      },
      pybind11::arg("launcher"));
  m.def("cuda_families", [] { return family_names(cuda_families()); });
}

}  // namespace bap_kernels
