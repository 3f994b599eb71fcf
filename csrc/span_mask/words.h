// Word 0 of Philox for the slots of one sequence, and the search among them, several slots at a time where the CPU has AVX2 or AVX-512.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../philox.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define EMOSCALE_X86 1
#include <immintrin.h>
#endif

namespace emoscale {

constexpr int64_t kLanes = 16;  // `out` of `slot_words` has room for a multiple of this

inline void slot_words_scalar(int64_t slots, uint64_t key, uint64_t seed, uint32_t* out) {
  for (int64_t slot = 0; slot < slots; ++slot)
    out[slot] = philox({{static_cast<uint32_t>(slot), static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), 0}}, seed)[0];
}

inline void take_smallest_scalar(uint32_t* words, int64_t padded, int64_t times, uint64_t* taken) {
  for (int64_t i = 0; i < times; ++i) {
    const uint32_t least = *std::min_element(words, words + padded);
    for (int64_t slot = 0; slot < padded; ++slot)
      if (words[slot] == least) {
        taken[slot / 64] |= uint64_t{1} << (slot % 64);
        words[slot] = UINT32_MAX;
      }
  }
}

#ifdef EMOSCALE_X86
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

// The same with eight counters at a time and both exclusive ors of a word in one instruction.
__attribute__((target("avx512f"))) inline void slot_words_avx512(int64_t slots, uint64_t key, uint64_t seed, uint32_t* out) {
  constexpr int kGroups = 2;
  constexpr int kXor3 = 0x96;
  const __m512i multiplier_a = _mm512_set1_epi64(kPhiloxA), multiplier_b = _mm512_set1_epi64(kPhiloxB);
  for (int64_t slot = 0; slot < slots; slot += kLanes) {
    __m512i c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      c0[g] = _mm512_add_epi64(_mm512_set1_epi64(slot + 8 * g), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
      c1[g] = _mm512_set1_epi64(static_cast<uint32_t>(key));
      c2[g] = _mm512_set1_epi64(static_cast<int64_t>(key >> 32));
      c3[g] = _mm512_setzero_si512();
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m512i k0 = _mm512_set1_epi64(key0), k1 = _mm512_set1_epi64(key1);
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
        const __m512i a = _mm512_mul_epu32(multiplier_a, c0[g]), b = _mm512_mul_epu32(multiplier_b, c2[g]);
        c0[g] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), k0, c1[g], kXor3);
        c2[g] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), k1, c3[g], kXor3);
        c1[g] = b;
        c3[g] = a;
      }
      key0 += kWeylA;
      key1 += kWeylB;
    }
    for (int g = 0; g < kGroups; ++g)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + slot + 8 * g), _mm512_cvtepi64_epi32(c0[g]));
  }
}

__attribute__((target("avx2"))) inline uint32_t least_lane_avx2(__m256i words) {
  __m128i least = _mm_min_epu32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  least = _mm_min_epu32(least, _mm_shuffle_epi32(least, 0b01001110));
  least = _mm_min_epu32(least, _mm_shuffle_epi32(least, 0b10110001));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(least));
}

// Whole vectors are written back, taken or not: a later load of a vector waits long for a store of a part of it.
__attribute__((target("avx2"))) inline void take_smallest_avx2(uint32_t* words, int64_t padded, int64_t times, uint64_t* taken) {
  const __m256i none = _mm256_set1_epi32(-1);
  __m256i least = none;
  for (int64_t slot = 0; slot < padded; slot += 8)
    least = _mm256_min_epu32(least, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + slot)));
  for (int64_t i = 0; i < times; ++i) {
    const __m256i value = _mm256_set1_epi32(static_cast<int>(least_lane_avx2(least)));
    least = none;
    for (int64_t slot = 0; slot < padded; slot += kLanes) {
      __m256i* here = reinterpret_cast<__m256i*>(words + slot);
      const __m256i first = _mm256_loadu_si256(here), second = _mm256_loadu_si256(here + 1);
      const __m256i is_first = _mm256_cmpeq_epi32(value, first), is_second = _mm256_cmpeq_epi32(value, second);
      const __m256i left = _mm256_or_si256(first, is_first), left_too = _mm256_or_si256(second, is_second);
      _mm256_storeu_si256(here, left);
      _mm256_storeu_si256(here + 1, left_too);
      least = _mm256_min_epu32(least, _mm256_min_epu32(left, left_too));
      const uint64_t found = static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(is_first))) |
                             static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(is_second))) << 8;
      taken[slot / 64] |= found << (slot % 64);
    }
  }
}

inline const bool kHasAvx2 = __builtin_cpu_supports("avx2");
inline const bool kHasAvx512 = __builtin_cpu_supports("avx512f");
#endif

// Writes the words of slots 0 … `slots` − 1, and whatever it likes up to the next multiple of kLanes.
inline void slot_words(int64_t slots, uint64_t key, uint64_t seed, uint32_t* out) {
#ifdef EMOSCALE_X86
  if (kHasAvx512) return slot_words_avx512(slots, key, seed, out);
  if (kHasAvx2) return slot_words_avx2(slots, key, seed, out);
#endif
  slot_words_scalar(slots, key, seed, out);
}

// So many times: takes every word that equals the smallest, sets its bit in `taken` and leaves UINT32_MAX in its place.
// `padded` is a multiple of kLanes above 0.
inline void take_smallest(uint32_t* words, int64_t padded, int64_t times, uint64_t* taken) {
#ifdef EMOSCALE_X86
  if (kHasAvx2) return take_smallest_avx2(words, padded, times, taken);
#endif
  take_smallest_scalar(words, padded, times, taken);
}

}  // namespace emoscale
