#include "span_mask/span_mask.cu"

namespace emoscale {
namespace {
uint32_t shared[kWarps * kWidest];
}
}  // namespace emoscale

extern "C" void span_mask(const int64_t* plan, int64_t b, uint64_t seed, int width, bool* flags) {
  using namespace emoscale;
  const unsigned blocks = static_cast<unsigned>((b + kWarps - 1) / kWarps);
  lanes::launch(blocks, kWarps * kWarp, [=] { span_mask_kernel(plan, b, seed, width, flags); });
}
