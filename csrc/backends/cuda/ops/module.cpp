// Python module bap_kernels._C_cuda: importing it registers the CUDA ops. It needs no GPU, and holds only whether the
// ops are a simulation, on CPU tensors.

#include <Python.h>

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", "CUDA operators of bap_kernels.", -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
#if defined(BAP_KERNELS_SIMULATED)
  constexpr int kSimulated = 1;
#else
  constexpr int kSimulated = 0;
#endif
  if (PyModule_AddIntConstant(module, "simulated", kSimulated) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
