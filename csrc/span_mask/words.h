// Word 0 of Philox for the slots of one sequence, and the search among them, several slots at a time where the CPU has AVX2.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../philox.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define EMOSCALE_AVX2 1
#include <immintrin.h>
#endif

namespace emoscale {

constexpr int64_t kLanes = 16;  // `out` of `slot_words` has room for a multiple of this

inline void slot_words_scalar(int64_t slots, uint64_t key, uint64_t seed, uint32_t* out) {
  for (int64_t slot = 0; slot < slots; ++slot)
    out[slot] = philox({{static_cast<uint32_t>(slot), static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), 0}}, seed)[0];
}

#ifdef EMOSCALE_AVX2
// Four 32-bit counters lie in the low halves of four 64-bit lanes: the multiplication reads low halves only, so the high
// halves of a product need no clearing. Four groups hide the latency of the multiplication.
__attribute__((target("avx2"))) inline void slot_words_avx2(int64_t slots, uint64_t key, uint64_t seed, uint32_t* out) {
  constexpr int kGroups = 4;
  const __m256i multiplier_a = _mm256_set1_epi64x(kPhiloxA), multiplier_b = _mm256_set1_epi64x(kPhiloxB);
  const __m256i low = _mm256_setr_epi32(0, 2, 4, 6, 0, 0, 0, 0);
  for (int64_t slot = 0; slot < slots; slot += kLanes) {
    __m256i c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      c0[g] = _mm256_add_epi64(_mm256_set1_epi64x(slot + 4 * g), _mm256_set_epi64x(3, 2, 1, 0));
      c1[g] = _mm256_set1_epi64x(static_cast<uint32_t>(key));
      c2[g] = _mm256_set1_epi64x(static_cast<int64_t>(key >> 32));
      c3[g] = _mm256_setzero_si256();
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m256i k0 = _mm256_set1_epi64x(key0), k1 = _mm256_set1_epi64x(key1);
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        const __m256i a = _mm256_mul_epu32(multiplier_a, c0[g]), b = _mm256_mul_epu32(multiplier_b, c2[g]);
        c0[g] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(b, 32), k0), c1[g]);
        c2[g] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(a, 32), k1), c3[g]);
        c1[g] = b;
        c3[g] = a;
      }
      key0 += kWeylA;
      key1 += kWeylB;
    }
    for (int g = 0; g < kGroups; ++g)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + slot + 4 * g), _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(c0[g], low)));
  }
}

__attribute__((target("avx2"))) inline int64_t smallest_avx2(const uint32_t* words, int64_t padded) {
  __m256i least = _mm256_set1_epi32(-1), least_too = least;
  for (int64_t slot = 0; slot < padded; slot += kLanes) {
    least = _mm256_min_epu32(least, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + slot)));
    least_too = _mm256_min_epu32(least_too, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + slot + 8)));
  }
  least = _mm256_min_epu32(least, least_too);
  least = _mm256_min_epu32(least, _mm256_permute2x128_si256(least, least, 1));
  least = _mm256_min_epu32(least, _mm256_shuffle_epi32(least, 0b01001110));
  least = _mm256_min_epu32(least, _mm256_shuffle_epi32(least, 0b10110001));
  for (int64_t slot = 0;; slot += 8) {
    const __m256i same = _mm256_cmpeq_epi32(least, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + slot)));
    const int found = _mm256_movemask_ps(_mm256_castsi256_ps(same));
    if (found != 0) return slot + __builtin_ctz(found);
  }
}

inline bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2");
  return has;
}
#endif

// Writes the words of slots 0 … `slots` − 1, and whatever it likes up to the next multiple of kLanes.
inline void slot_words(int64_t slots, uint64_t key, uint64_t seed, uint32_t* out) {
#ifdef EMOSCALE_AVX2
  if (has_avx2()) return slot_words_avx2(slots, key, seed, out);
#endif
  slot_words_scalar(slots, key, seed, out);
}

// Gives the first of the smallest among `padded` words, a multiple of kLanes above 0.
inline int64_t smallest(const uint32_t* words, int64_t padded) {
#ifdef EMOSCALE_AVX2
  if (has_avx2()) return smallest_avx2(words, padded);
#endif
  return std::min_element(words, words + padded) - words;
}

}  // namespace emoscale
