// Writing large results once, at the speed of the memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace emoscale {

// Asks for pages of 2 MiB under memory that nobody has touched yet: a fresh 200 MB result otherwise costs 50,000 faults,
// which take longer than writing it.
inline void prefer_huge_pages(void* data, std::size_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kHuge = std::uintptr_t{1} << 21;
  const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const auto end = (reinterpret_cast<std::uintptr_t>(data) + bytes) & ~(kHuge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: refusal changes nothing
#endif
}

// Copies past the caches, so that lines are not read before they are written; fence() makes the writes visible.
inline void stream_copy(void* to, const void* from, std::size_t bytes) {
#if defined(__x86_64__)
  auto* target = static_cast<char*>(to);
  auto* source = static_cast<const char*>(from);
  const std::size_t head = -reinterpret_cast<std::uintptr_t>(target) & 15;
  if (bytes >= head + 16) {
    std::memcpy(target, source, head);
    std::size_t at = head;
    for (; at + 16 <= bytes; at += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + at), _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at)));
    std::memcpy(target + at, source + at, bytes - at);
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace emoscale
