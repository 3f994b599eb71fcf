// Enough of CUDA to run a kernel of csrc/ on CPU threads, one per lane: the test's stand-in for <cuda_runtime_api.h>.
#pragma once

#include <algorithm>
#include <barrier>
#include <cstdint>
#include <deque>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __restrict__ __restrict
#define __launch_bounds__(threads)

using cudaError_t = int;
using cudaStream_t = void*;
using std::min;

namespace lanes {

constexpr int kWarp = 32;

struct Warp {
  std::barrier<> gate{kWarp};
  bool votes[kWarp];
};

inline thread_local Warp* mine;

}  // namespace lanes

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx;

inline void __syncwarp() { lanes::mine->gate.arrive_and_wait(); }

inline unsigned __ballot_sync(unsigned, bool vote) {
  lanes::mine->votes[threadIdx.x % lanes::kWarp] = vote;
  __syncwarp();
  unsigned bits = 0;
  for (int lane = 0; lane < lanes::kWarp; ++lane) bits |= static_cast<unsigned>(lanes::mine->votes[lane]) << lane;
  __syncwarp();
  return bits;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

namespace lanes {

// Runs the blocks one after the other, each with one thread per lane.
template <class Kernel>
void launch(unsigned blocks, unsigned threads, const Kernel& kernel) {
  for (unsigned block = 0; block < blocks; ++block) {
    std::deque<Warp> warps(threads / kWarp);
    std::vector<std::jthread> running;
    for (unsigned thread = 0; thread < threads; ++thread)
      running.emplace_back([&, thread] {
        threadIdx.x = thread;
        blockIdx.x = block;
        mine = &warps[thread / kWarp];
        kernel();
      });
  }
}

}  // namespace lanes
