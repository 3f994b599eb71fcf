#pragma once

#include <ATen/core/Tensor.h>

namespace emoscale {

// Marks counts[i] disjoint spans of spans[i] frames in each sequence; the same bits as
// emoscale/kernels/span_mask/reference.py. All tensors int64 [b] on the CPU; gives bool [sum(lengths)].
at::Tensor span_mask_cpu(const at::Tensor& lengths, const at::Tensor& counts, const at::Tensor& spans, const at::Tensor& keys,
                         int64_t seed);

}  // namespace emoscale
