// What tells whether a model has changed since a plan was made of it. It is asked at every call of the plan, about
// hundreds of places that the layers have driven from the caches, those of addresses too, which prefetches do not help.
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <utility>
#include <vector>

#include "dispatch/fingerprint.h"
#include "dispatch/tensor_state.h"
#include "plan/bindings.h"

namespace py = pybind11;

namespace bap_kernels {
namespace {

// Entries of dictionaries: `tables` and `names` are as long as each other. Python holds both, so that its garbage
// collector sees them.
void check_lengths(const char* function, const py::list& tables, const py::list& others) {
  TORCH_CHECK_VALUE(tables.size() == others.size(), function, "(): expected lists of one length, got ", tables.size(),
                    " and ", others.size(), ".");
}

PyObject* entry(const py::list& tables, const py::list& names, Py_ssize_t i) {
  PyObject* table = PyList_GET_ITEM(tables.ptr(), i);
  TORCH_CHECK_TYPE(PyDict_Check(table), "expected dictionaries.");
  PyObject* object = PyDict_GetItemWithError(table, PyList_GET_ITEM(names.ptr(), i));
  if (object == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return object;
}

// What they hold now; None for those that are gone.
py::list entries(const py::list& tables, const py::list& names) {
  check_lengths("entries", tables, names);
  py::list objects(tables.size());
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tables.ptr()); ++i) {
    PyObject* object = entry(tables, names, i);
    objects[i] = object == nullptr ? py::none() : py::reinterpret_borrow<py::object>(object);
  }
  return objects;
}

// Whether entries() would give the same objects again.
bool entries_are(const py::list& tables, const py::list& names, const py::list& objects) {
  check_lengths("entries_are", tables, names);
  check_lengths("entries_are", tables, objects);
  bool same = true;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tables.ptr()); ++i) {
    PyObject* object = entry(tables, names, i);
    same &= (object == nullptr ? Py_None : object) == PyList_GET_ITEM(objects.ptr(), i);
  }
  return same;
}

// Whether each dictionary has so many entries.
bool sizes_are(const py::list& tables, const py::list& sizes) {
  check_lengths("sizes_are", tables, sizes);
  bool same = true;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tables.ptr()); ++i) {
    PyObject* table = PyList_GET_ITEM(tables.ptr(), i);
    TORCH_CHECK_TYPE(PyDict_Check(table), "expected dictionaries.");
    same &= PyDict_GET_SIZE(table) == PyLong_AsSsize_t(PyList_GET_ITEM(sizes.ptr(), i));
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
                                         counts_writes(t) ? static_cast<uint64_t>(t._version()) : 0};
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
  const py::arg tables("tables"), names("names");
  m.def("entries", &entries, tables, names);
  m.def("entries_are", &entries_are, tables, names, py::arg("objects"));
  m.def("sizes_are", &sizes_are, tables, py::arg("sizes"));
  m.def("fingerprint", &fingerprint, py::arg("tensors"));
}

}  // namespace bap_kernels
