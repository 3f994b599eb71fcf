#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace emoscale {

// Max + mean over each sequence of packed rows; the values and gradients of
// emoscale/kernels/max_mean_pool/reference.py. x is [t, d] (float64, float32, bfloat16 or float16), cu_seqlens an
// integer [b + 1] from 0 to t, both on the CPU. Gives the pooled [b, d] and `peak` int32 [b, d], what the backward needs
// to know about each maximum: the first row that holds it, its complement where several rows do, kNotANumber where the
// pooled value is NaN.
std::tuple<at::Tensor, at::Tensor> max_mean_pool_cpu(const at::Tensor& x, const at::Tensor& cu_seqlens);

// The gradient [t, d]: written once, and x read only in columns where rows share the maximum.
at::Tensor max_mean_pool_backward_cpu(const at::Tensor& grad, const at::Tensor& peak, const at::Tensor& x,
                                      const at::Tensor& cu_seqlens);

}  // namespace emoscale
