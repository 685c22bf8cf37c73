// Python module bap_kernels._C_cuda: the table of its launches, in a capsule. Importing it needs no GPU.
#include <Python.h>

#include "backends/cuda/kernels/launcher.h"

PyMODINIT_FUNC PyInit__C_cuda() {
  using bap_kernels::CudaLauncher;
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", "CUDA kernels of bap_kernels.", -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  auto* table = const_cast<CudaLauncher*>(&bap_kernels::linked_launcher());
  PyObject* capsule = PyCapsule_New(table, bap_kernels::kLauncherCapsule, nullptr);
  if (capsule == nullptr || PyModule_AddObject(module, "launcher", capsule) != 0) {
    Py_XDECREF(capsule);
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
