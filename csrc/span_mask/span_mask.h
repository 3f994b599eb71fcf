#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

namespace emoscale {

// Marks disjoint spans in each sequence: counts as `span_counts`, bits as `reference.span_mask` of
// emoscale/kernels/span_mask. `lengths` and `keys` are int64 [b] on the CPU; gives bool [sum(lengths)].
// `rule` is "nearest", "floor" or "prob".
at::Tensor span_mask_cpu(const at::Tensor& lengths, const at::Tensor& keys, int64_t seed, int64_t span, double ratio, std::string_view rule);

// The same bits on a GPU. `plan` is int64 [5, b] there: offsets, slots, counts, spans, keys (emoscale/kernels/span_mask/plan.py);
// `total` is the sum of the lengths and `width` the most slots of one sequence, at most kWidest. No host sync.
at::Tensor span_mask_cuda(const at::Tensor& plan, int64_t seed, int64_t total, int64_t width);

}  // namespace emoscale
