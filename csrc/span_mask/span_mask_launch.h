// What the CUDA source gives the C++ one: no PyTorch header, so that nvcc compiles it in seconds.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace emoscale {

constexpr int64_t kWidest = 2048;  // slots of one sequence

// `plan` int64 [5, b] and `flags` bool [sum of the lengths] lie on the device of `stream`; see span_mask.h.
cudaError_t launch_span_mask(const int64_t* plan, int64_t b, uint64_t seed, int64_t width, bool* flags, cudaStream_t stream);

}  // namespace emoscale
