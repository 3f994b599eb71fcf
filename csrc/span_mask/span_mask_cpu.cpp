#include "span_mask.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <vector>

#include "../philox.h"
#include "words.h"

namespace emoscale {
namespace {

constexpr int64_t kLongest = (int64_t{1} << 24) - 1;  // the reference packs a slot into 24 bits
constexpr int64_t kGrain = 1 << 16;                   // frames per task, about 0.2 ms: waking a thread can cost more than less
constexpr int64_t kFew = 24;                          // up to here repeated search beats nth_element
constexpr double kWords = 4294967296.0;

struct Rule {
  int64_t span;
  double ratio;
  double up;  // added before rounding down; below 0: a number in [0, 1) drawn for each sequence
};

struct Spans {
  int64_t count, size;
};

Spans spans_of(int64_t length, uint64_t key, uint64_t seed, const Rule& rule) {
  if (length == 0) return {0, 0};
  if (rule.ratio == 1.0) return {1, length};
  const int64_t size = std::min(std::max<int64_t>(length / 2, 1), rule.span);
  const double drawn = rule.up >= 0 ? rule.up
                                    : philox({{0, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), 1}}, seed)[0] / kWords;
  const double wanted = static_cast<double>(length) * rule.ratio / static_cast<double>(rule.span) + drawn;
  return {std::min(std::max<int64_t>(static_cast<int64_t>(wanted), 1), length / size), size};
}

struct Scratch {
  std::vector<uint32_t> words;
  std::vector<uint64_t> order;
  std::vector<uint64_t> chosen;  // one bit per slot
};

// Chooses the `count` slots of the smallest words by taking the smallest `count` times: with AVX2 no branch depends on a word,
// which is worth more than the fewer comparisons of a heap. Says no where words were equal, so that more slots were taken: the earlier
// one counts, and a real word may be the one that stands for no slot.
bool choose_few(int64_t slots, int64_t count, Scratch& scratch) {
  uint32_t* words = scratch.words.data();
  const int64_t padded = (slots + kLanes - 1) / kLanes * kLanes;
  std::fill(words + slots, words + padded, UINT32_MAX);
  take_smallest(words, padded, count, scratch.chosen.data());
  int64_t taken = 0;
  for (const uint64_t bits : scratch.chosen) taken += std::popcount(bits);
  return taken == count;
}

void choose_many(int64_t slots, int64_t count, Scratch& scratch) {
  std::vector<uint64_t>& order = scratch.order;
  order.resize(slots);
  for (int64_t slot = 0; slot < slots; ++slot) order[slot] = uint64_t{scratch.words[slot]} << 32 | static_cast<uint64_t>(slot);
  std::nth_element(order.begin(), order.begin() + (count - 1), order.end());
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t slot = static_cast<uint32_t>(order[i]);
    scratch.chosen[slot / 64] |= uint64_t{1} << (slot % 64);
  }
}

void mark(int64_t length, uint64_t key, uint64_t seed, const Rule& rule, Scratch& scratch, bool* flags) {
  const Spans spans = spans_of(length, key, seed, rule);
  const int64_t slots = length - spans.count * (spans.size - 1);
  const auto draw = [&] {
    scratch.words.resize((slots + kLanes - 1) / kLanes * kLanes);
    slot_words(slots, key, seed, scratch.words.data());
    scratch.chosen.assign(slots / 64 + 1, 0);
  };
  draw();
  if (spans.count > kFew) {
    choose_many(slots, spans.count, scratch);
  } else if (!choose_few(slots, spans.count, scratch)) {
    draw();
    choose_many(slots, spans.count, scratch);
  }
  int64_t before = 0;
  for (size_t part = 0; part < scratch.chosen.size(); ++part)
    for (uint64_t bits = scratch.chosen[part]; bits != 0; bits &= bits - 1, ++before) {
      const int64_t slot = static_cast<int64_t>(part) * 64 + std::countr_zero(bits);
      bool* start = flags + slot + before * (spans.size - 1);
      for (int64_t frame = 0; frame < spans.size; ++frame) start[frame] = true;
    }
}

double rounding(std::string_view rule) {
  if (rule == "nearest") return 0.5;
  if (rule == "floor") return 0.0;
  TORCH_CHECK_VALUE(rule == "prob", "span_mask: rule '", rule, "' is none of nearest, floor, prob");
  return -1.0;
}

}  // namespace

at::Tensor span_mask_cpu(const at::Tensor& lengths, const at::Tensor& keys, int64_t seed, int64_t span, double ratio, std::string_view rule) {
  TORCH_CHECK_VALUE(lengths.dim() == 1 && keys.dim() == 1 && lengths.numel() == keys.numel(), "span_mask: lengths ", lengths.sizes(),
                    " and keys ", keys.sizes(), " must be [b] both");
  const auto l = lengths.contiguous(), k = keys.contiguous();
  const int64_t *length = l.const_data_ptr<int64_t>(), *key = k.const_data_ptr<int64_t>();
  const Rule how{span, ratio, rounding(rule)};
  const int64_t b = l.numel();
  std::vector<int64_t> offsets(b + 1, 0);
  for (int64_t i = 0; i < b; ++i) {
    TORCH_CHECK_VALUE(length[i] >= 0 && length[i] <= kLongest, "span_mask: a sequence of ", length[i], " frames; 0 to 2^24 - 1 can be masked");
    offsets[i + 1] = offsets[i] + length[i];
  }
  at::Tensor out = at::zeros({offsets[b]}, l.options().dtype(at::kBool));
  bool* flags = out.mutable_data_ptr<bool>();
  const int64_t rows = std::max<int64_t>(1, kGrain * b / std::max<int64_t>(offsets[b], 1));  // per task, of mean length
  at::parallel_for(0, b, rows, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t i = begin; i < end; ++i)
      if (length[i] > 0) mark(length[i], static_cast<uint64_t>(key[i]), static_cast<uint64_t>(seed), how, scratch, flags + offsets[i]);
  });
  return out;
}

}  // namespace emoscale
