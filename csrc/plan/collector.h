// Classes that hold Python's objects, which its garbage collector has to see: a model may lead back to its own plan.
#pragma once

#include <pybind11/pybind11.h>

namespace bap_kernels {

// For py::class_ of a T with `visit(f)`, which calls f for each object. It frees none of them: a cycle leads through
// dictionaries, which the collector empties.
template <class T>
pybind11::custom_type_setup visited_by_collector() {
  return pybind11::custom_type_setup([](PyHeapTypeObject* heap_type) {
    PyTypeObject* type = &heap_type->ht_type;
    type->tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      const auto held = reinterpret_cast<pybind11::detail::instance*>(self)->get_value_and_holder();
      if (!held.holder_constructed()) return 0;
      int answer = 0;
      static_cast<const T*>(held.value_ptr())->visit([&](pybind11::handle object) {
        if (answer == 0 && object) answer = visit(object.ptr(), arg);
      });
      return answer;
    };
  });
}

}  // namespace bap_kernels
