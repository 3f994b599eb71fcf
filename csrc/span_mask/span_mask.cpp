#include "span_mask.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "../philox.h"

namespace emoscale {
namespace {

constexpr int kSlotBits = 24;
constexpr int64_t kGrain = 64;  // sequences per task: one takes about a microsecond

void mark(int64_t length, int64_t count, int64_t span, uint64_t key, uint64_t seed, std::vector<int64_t>& order, bool* flags) {
  const int64_t slots = length - count * (span - 1);
  order.resize(slots);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const auto words = philox({static_cast<uint32_t>(slot), static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), 0}, seed);
    order[slot] = (static_cast<int64_t>(words[0]) << kSlotBits) | slot;
  }
  std::nth_element(order.begin(), order.begin() + count, order.end());
  for (int64_t i = 0; i < count; ++i) order[i] &= (int64_t{1} << kSlotBits) - 1;
  std::sort(order.begin(), order.begin() + count);
  for (int64_t i = 0; i < count; ++i) std::fill_n(flags + order[i] + i * (span - 1), span, true);
}

}  // namespace

at::Tensor span_mask_cpu(const at::Tensor& lengths, const at::Tensor& counts, const at::Tensor& spans, const at::Tensor& keys,
                         int64_t seed) {
  const auto l = lengths.contiguous(), n = counts.contiguous(), s = spans.contiguous(), k = keys.contiguous();
  const int64_t* length = l.const_data_ptr<int64_t>();
  const int64_t b = l.numel();
  std::vector<int64_t> offsets(b + 1, 0);
  for (int64_t i = 0; i < b; ++i) {
    TORCH_CHECK(length[i] < (int64_t{1} << kSlotBits), "span_mask: a sequence of ", length[i], " frames is longer than 2^24 - 1");
    offsets[i + 1] = offsets[i] + length[i];
  }
  at::Tensor out = at::zeros({offsets[b]}, l.options().dtype(at::kBool));
  bool* flags = out.mutable_data_ptr<bool>();
  at::parallel_for(0, b, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> order;
    for (int64_t i = begin; i < end; ++i) {
      if (length[i] == 0) continue;
      mark(length[i], n.const_data_ptr<int64_t>()[i], s.const_data_ptr<int64_t>()[i], static_cast<uint64_t>(k.const_data_ptr<int64_t>()[i]),
           static_cast<uint64_t>(seed), order, flags + offsets[i]);
    }
  });
  return out;
}

}  // namespace emoscale
