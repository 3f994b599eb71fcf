// Built only where CUDA is (setup.py leaves out *_cuda.cpp elsewhere); registers itself.
#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "span_mask.h"
#include "span_mask_launch.h"

namespace emoscale {

at::Tensor span_mask_cuda(const at::Tensor& plan, int64_t seed, int64_t total, int64_t width) {
  TORCH_CHECK_VALUE(plan.dim() == 2 && plan.size(0) == 5, "span_mask: plan is ", plan.sizes(), ", must be [5, b]");
  TORCH_CHECK_VALUE(width <= kWidest, "span_mask: ", width, " slots in one sequence; the CUDA form takes ", kWidest);
  const c10::cuda::CUDAGuard guard(plan.device());
  const at::Tensor packed = plan.contiguous();
  at::Tensor out = at::empty({total}, packed.options().dtype(at::kBool));
  if (total == 0) return out;
  C10_CUDA_CHECK(launch_span_mask(packed.const_data_ptr<int64_t>(), packed.size(1), static_cast<uint64_t>(seed), width,
                                  out.mutable_data_ptr<bool>(), c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace emoscale

TORCH_LIBRARY_IMPL(emoscale, CUDA, library) { library.impl("span_mask_planned", &emoscale::span_mask_cuda); }
