// The schemas of torch.ops.emoscale and their CPU forms; a *_cuda.cpp file registers its own, so that a build without CUDA
// needs no word of it here.
#include <Python.h>
#include <torch/library.h>

#include "max_mean_pool/max_mean_pool.h"
#include "span_mask/span_mask.h"

TORCH_LIBRARY(emoscale, library) {
  library.def("span_mask(Tensor lengths, Tensor keys, int seed, int span, float ratio, str rule) -> Tensor");
  library.def("span_mask_planned(Tensor plan, int seed, int total, int width) -> Tensor");
  library.def("max_mean_pool(Tensor x, Tensor cu_seqlens) -> (Tensor pooled, Tensor peak)");
  library.def("max_mean_pool_backward(Tensor grad, Tensor peak, Tensor x, Tensor cu_seqlens) -> Tensor");
}

TORCH_LIBRARY_IMPL(emoscale, CPU, library) {
  library.impl("span_mask", &emoscale::span_mask_cpu);
  library.impl("max_mean_pool", &emoscale::max_mean_pool_cpu);
  library.impl("max_mean_pool_backward", &emoscale::max_mean_pool_backward_cpu);
}

// Importing the module runs the registrations above; it holds no function of its own.
extern "C" PyObject* PyInit__native() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
