// Draws and takes words in every form that this CPU runs, compares each with the scalar form, and prints the forms' names.
#include "span_mask/words.h"

#include <cstdio>
#include <vector>

namespace {

using namespace emoscale;

using Draw = void (*)(int64_t, uint64_t, uint64_t, uint32_t*);
using Take = void (*)(uint32_t*, int64_t, int64_t, uint64_t*);

bool alike(const char* name, Draw draw, Take take) {
  for (const uint64_t seed : {uint64_t{0}, uint64_t{77}, uint64_t{5} << 33, ~uint64_t{0}})
    for (int64_t slots = 1; slots < 200; ++slots) {
      const uint64_t key = 0x9E3779B97F4A7C15 * static_cast<uint64_t>(slots);
      const int64_t padded = (slots + kLanes - 1) / kLanes * kLanes;
      std::vector<uint32_t> expected(padded), found(padded);
      slot_words_scalar(slots, key, seed, expected.data());
      draw(slots, key, seed, found.data());
      for (int64_t slot = slots; slot < padded; ++slot) expected[slot] = found[slot] = UINT32_MAX;
      if (found != expected) return std::printf("%s draws other words: %ld slots\n", name, slots), false;
      for (int64_t slot = 7; slot < slots; slot += 7) expected[slot] = found[slot] = expected[slot / 2];  // equal words
      std::vector<uint64_t> taken(slots / 64 + 1), taken_too(slots / 64 + 1);
      take_smallest_scalar(expected.data(), padded, (slots + 3) / 4, taken.data());
      take(found.data(), padded, (slots + 3) / 4, taken_too.data());
      if (found != expected || taken != taken_too) return std::printf("%s takes other words: %ld slots\n", name, slots), false;
    }
  return std::puts(name), true;
}

}  // namespace

int main() {
  bool right = alike("scalar", slot_words_scalar, take_smallest_scalar);
#ifdef EMOSCALE_X86
  if (kHasAvx2) right &= alike("avx2", slot_words_avx2, take_smallest_avx2);
  if (kHasAvx512) right &= alike("avx512", slot_words_avx512, take_smallest_avx2);
#endif
  return right ? 0 : 1;
}
