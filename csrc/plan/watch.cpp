// What tells whether a model has changed since a plan was made of it. It is asked at every call of the plan, about
// hundreds of places that the layers have driven from the caches, those of addresses too, which prefetches do not help.
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <utility>
#include <vector>

#include "dispatch/fingerprint.h"
#include "plan/bindings.h"

namespace py = pybind11;

namespace bap_kernels {
namespace {

// Entries of dictionaries, which are kept alive.
class Places {
 public:
  void add(py::dict table, py::str name) { places_.emplace_back(std::move(table), std::move(name)); }

  // What they hold now; None for those that are gone.
  py::list read() const {
    py::list objects(places_.size());
    for (size_t i = 0; i < places_.size(); ++i) {
      PyObject* object = found(i);
      objects[i] = object == nullptr ? py::none() : py::reinterpret_borrow<py::object>(object);
    }
    return objects;
  }

  // Whether read() would give the same objects again.
  bool hold(const py::list& objects) const {
    TORCH_CHECK_VALUE(objects.size() == places_.size(), "Places.hold(): expected ", places_.size(), " objects, got ",
                      objects.size(), ".");
    bool same = true;
    for (size_t i = 0; i < places_.size(); ++i) {
      PyObject* object = found(i);
      same &= (object == nullptr ? Py_None : object) == PyList_GET_ITEM(objects.ptr(), static_cast<Py_ssize_t>(i));
    }
    return same;
  }

  // Whether all of them are there.
  bool exist() const {
    bool all = true;
    for (size_t i = 0; i < places_.size(); ++i) all &= found(i) != nullptr;
    return all;
  }

 private:
  PyObject* found(size_t i) const {
    PyObject* object = PyDict_GetItemWithError(places_[i].first.ptr(), places_[i].second.ptr());
    if (object == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return object;
  }

  std::vector<std::pair<py::dict, py::str>> places_;
};

// How many entries each dictionary has.
std::vector<Py_ssize_t> sizes(const std::vector<py::dict>& tables) {
  std::vector<Py_ssize_t> all;
  for (const py::dict& table : tables) all.push_back(PyDict_GET_SIZE(table.ptr()));
  return all;
}

// Whether each has as many as it had.
bool have_sizes(const py::list& tables, const py::list& expected) {
  TORCH_CHECK_VALUE(tables.size() == expected.size(), "have_sizes(): expected a size for each table.");
  bool same = true;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tables.ptr()); ++i) {
    PyObject* table = PyList_GET_ITEM(tables.ptr(), i);
    same &= PyDict_GET_SIZE(table) == PyLong_AsSsize_t(PyList_GET_ITEM(expected.ptr(), i));
  }
  return same;
}

// What tells whether a tensor has changed: on the CPU its values; elsewhere, where they cannot be read without a stall,
// the tensor, its storage, address and version.
Fingerprint fingerprint_state(const at::Tensor& t) {
  if (t.is_cpu()) return fingerprint_values(t);
  uint64_t storage = 0;
  if (t.has_storage()) {
    storage =
        reinterpret_cast<uintptr_t>(t.storage().unsafeGetStorageImpl()) + static_cast<uint64_t>(t.storage_offset());
  }
  const std::array<uint64_t, 3> state = {reinterpret_cast<uintptr_t>(t.unsafeGetTensorImpl()), storage,
                                         t.is_inference() ? 0 : static_cast<uint64_t>(t._version())};
  return fingerprint_bytes(state.data(), sizeof(state));
}

py::bytes fingerprint(const py::list& tensors) {
  std::vector<Fingerprint> parts;
  parts.reserve(tensors.size());
  for (const py::handle& object : tensors) {
    TORCH_CHECK_TYPE(THPVariable_Check(object.ptr()), "fingerprint(): expected tensors.");
    parts.push_back(fingerprint_state(THPVariable_Unpack(object.ptr())));
  }
  const Fingerprint all = fingerprint_bytes(parts.data(), static_cast<int64_t>(parts.size() * sizeof(Fingerprint)));
  return {reinterpret_cast<const char*>(all.data()), sizeof(all)};
}

}  // namespace

void bind_watch(py::module_& m) {
  py::class_<Places>(m, "Places")
      .def(py::init<>())
      .def("add", &Places::add, py::arg("table"), py::arg("name"))
      .def("read", &Places::read)
      .def("hold", &Places::hold, py::arg("objects"))
      .def("exist", &Places::exist);
  m.def("sizes", &sizes, py::arg("tables"));
  m.def("have_sizes", &have_sizes, py::arg("tables"), py::arg("expected"));
  m.def("fingerprint", &fingerprint, py::arg("tensors"));
}

}  // namespace bap_kernels
