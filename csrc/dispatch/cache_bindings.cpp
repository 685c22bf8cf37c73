// See cache_bindings.h.
#include "dispatch/cache_bindings.h"

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "dispatch/list_form.h"
#include "dispatch/pack_weight.h"
#include "dispatch/stream.h"

namespace py = pybind11;

namespace bap_kernels {

void bind_device_caches(py::module_& m) {
  // Those that may wait for a device do so without Python's lock.
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def(
      "list_form",
      [](const OptionalTensor& index, int64_t channels, bool blocks, int64_t most) {
        const ListForm form = list_form(index, channels, blocks, most);
        return std::tuple(form.entries, form.block, form.length);
      },
      py::arg("index"), py::arg("channels"), py::arg("blocks") = true, py::arg("most") = kLongestBlock, unlocked);
  m.def("inverse_list", &inverse_list, py::arg("index"), py::arg("channels"), unlocked);
  m.def("all_channels", &all_channels, py::arg("channels"), py::arg("device"), unlocked);
  m.def("pack_weight", &pack_weight, py::arg("weight"), py::arg("rows"), py::arg("columns"), py::arg("by_input"),
        unlocked);
  m.attr("PACKED_ALIGNMENT") = kPackedAlignment;
  py::class_<SharedTensor>(m, "SharedTensor")
      .def(py::init<at::Tensor>(), py::arg("tensor"), unlocked)
      .def("use", &SharedTensor::use, unlocked);
  m.def("capturing", &capturing, py::arg("device"), unlocked);
  m.def(
      "pin_for_graph", [](const at::Tensor& owner, const at::Tensor& tensor) { pin_for_graph(owner, tensor); },
      py::arg("owner"), py::arg("tensor"), unlocked);
  m.def(
      "simulate_stream",
      [](std::optional<int64_t> id, bool capturing) {
        simulate_stream(id.has_value() ? std::optional(SimulatedStream{*id, capturing}) : std::nullopt);
      },
      py::arg("id"), py::arg("capturing") = false);
  m.def("take_stream_log", &take_stream_log);
}

}  // namespace bap_kernels
