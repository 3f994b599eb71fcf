// Philox-4x32-10 (Salmon et al. 2011): the same words as emoscale/kernels/philox.py, on the CPU and in CUDA.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define EMOSCALE_HOST_DEVICE __host__ __device__
#else
#define EMOSCALE_HOST_DEVICE
#endif

namespace emoscale {

constexpr uint64_t kPhiloxA = 0xD2511F53, kPhiloxB = 0xCD9E8D57;
constexpr uint32_t kWeylA = 0x9E3779B9, kWeylB = 0xBB67AE85;
constexpr int kPhiloxRounds = 10;

struct Words {
  uint32_t word[4];
  EMOSCALE_HOST_DEVICE uint32_t operator[](int i) const { return word[i]; }
};

EMOSCALE_HOST_DEVICE inline Words philox(Words counter, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t a = kPhiloxA * counter[0], b = kPhiloxB * counter[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += kWeylA;
    key1 += kWeylB;
  }
  return counter;
}

}  // namespace emoscale
