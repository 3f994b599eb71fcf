// Span masking on a GPU: one warp chooses the slots of one sequence, in one launch and without a host sync.
//
// The n-th smallest word is found bit by bit from the top (32 counts over the warp), so nothing is sorted; equal words go to
// the earlier slot by counting them off. A slot's place among the frames is its number plus (span − 1) for every chosen slot
// before it, so each frame is written exactly once and the output needs no clearing.
#include "span_mask.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../philox.h"

namespace emoscale {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 4;            // sequences per block
constexpr int64_t kWidest = 2048;    // slots; four sequences of words fill 32 of the 48 KB that need no opt-in
constexpr unsigned kAll = 0xFFFFFFFFu;

// Counts the words below `bound`; every lane of the warp gets the count.
__device__ int below(const uint32_t* words, int slots, int lane, uint32_t bound) {
  int found = 0;
  for (int first = 0; first < slots; first += kWarp)
    found += __popc(__ballot_sync(kAll, first + lane < slots && words[first + lane] < bound));
  return found;
}

__global__ void __launch_bounds__(kWarps * kWarp)
span_mask_kernel(const int64_t* __restrict__ plan, int64_t b, uint64_t seed, int width, bool* __restrict__ flags) {
  extern __shared__ uint32_t shared[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = int64_t{blockIdx.x} * kWarps + warp;
  if (row >= b) return;  // a whole warp leaves, and no block-wide barrier follows
  uint32_t* words = shared + warp * width;
  const int slots = static_cast<int>(plan[b + row]), count = static_cast<int>(plan[2 * b + row]);
  const int64_t span = plan[3 * b + row];
  const uint64_t key = static_cast<uint64_t>(plan[4 * b + row]);
  bool* out = flags + plan[row];

  for (int slot = lane; slot < slots; slot += kWarp)
    words[slot] = philox({{static_cast<uint32_t>(slot), static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), 0}}, seed)[0];
  __syncwarp();

  uint32_t bound = 0;  // the largest value with fewer than `count` words below it: the count-th smallest word
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t higher = bound | (uint32_t{1} << bit);
    if (below(words, slots, lane, higher) < count) bound = higher;
  }
  int ties = count - below(words, slots, lane, bound);  // how many words equal to `bound` are still to be taken

  const unsigned before_me = (1u << lane) - 1u;
  int64_t chosen_before = 0;
  for (int first = 0; first < slots; first += kWarp) {
    const int slot = first + lane;
    const bool real = slot < slots;
    const uint32_t word = real ? words[slot] : 0;
    const unsigned equal = __ballot_sync(kAll, real && word == bound);
    const bool chosen = real && (word < bound || (word == bound && __popc(equal & before_me) < ties));
    const unsigned all_chosen = __ballot_sync(kAll, chosen);
    const int64_t place = slot + (chosen_before + __popc(all_chosen & before_me)) * (span - 1);
    if (real) out[place] = chosen;
    if (chosen)
      for (int64_t frame = 1; frame < span; ++frame) out[place + frame] = true;
    ties -= min(ties, __popc(equal));
    chosen_before += __popc(all_chosen);
  }
}

}  // namespace

at::Tensor span_mask_cuda(const at::Tensor& plan, int64_t seed, int64_t total, int64_t width) {
  TORCH_CHECK_VALUE(plan.dim() == 2 && plan.size(0) == 5, "span_mask: plan is ", plan.sizes(), ", must be [5, b]");
  TORCH_CHECK_VALUE(width <= kWidest, "span_mask: ", width, " slots in one sequence; the CUDA form takes ", kWidest);
  const c10::cuda::CUDAGuard guard(plan.device());
  const at::Tensor packed = plan.contiguous();
  at::Tensor out = at::empty({total}, packed.options().dtype(at::kBool));
  const int64_t b = packed.size(1);
  if (total == 0) return out;
  const int blocks = static_cast<int>((b + kWarps - 1) / kWarps);
  const size_t memory = kWarps * width * sizeof(uint32_t);
  span_mask_kernel<<<blocks, kWarps * kWarp, memory, c10::cuda::getCurrentCUDAStream()>>>(
      packed.const_data_ptr<int64_t>(), b, static_cast<uint64_t>(seed), static_cast<int>(width), out.mutable_data_ptr<bool>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace emoscale

TORCH_LIBRARY_IMPL(emoscale, CUDA, library) { library.impl("span_mask_planned", &emoscale::span_mask_cuda); }
