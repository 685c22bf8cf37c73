// Python module bap_kernels._C_cuda: importing it registers the CUDA ops. It holds nothing and needs no GPU.

#include <Python.h>

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", "CUDA operators of bap_kernels.", -1, nullptr};
  return PyModule_Create(&definition);
}
