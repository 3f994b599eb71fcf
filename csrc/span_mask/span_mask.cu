// Span masking on a GPU: one warp chooses the slots of one sequence, in one launch and without a host sync.
//
// The n-th smallest word is found bit by bit from the top (32 counts over the warp), so nothing is sorted; equal words go to
// the earlier slot by counting them off. A slot's place among the frames is its number plus (span − 1) for every chosen slot
// before it, so each frame is written exactly once and the output needs no clearing.
#include "span_mask_launch.h"

#include "../philox.h"

namespace emoscale {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 4;  // sequences per block
static_assert(kWarps * kWidest * sizeof(uint32_t) <= 48 * 1024, "the words of a block fit the shared memory that needs no opt-in");
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

#ifdef __CUDACC__  // a test runs the kernel above on CPU threads, which know no launch syntax
cudaError_t launch_span_mask(const int64_t* plan, int64_t b, uint64_t seed, int64_t width, bool* flags, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((b + kWarps - 1) / kWarps);
  const size_t memory = kWarps * width * sizeof(uint32_t);
  span_mask_kernel<<<blocks, kWarps * kWarp, memory, stream>>>(plan, b, seed, static_cast<int>(width), flags);
  return cudaGetLastError();
}
#endif

}  // namespace emoscale
