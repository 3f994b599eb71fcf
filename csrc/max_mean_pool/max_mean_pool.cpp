#include "max_mean_pool.h"

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <ranges>
#include <vector>

#include "../memory.h"

namespace emoscale {
namespace {

constexpr int32_t kShared = std::numeric_limits<int32_t>::min();  // the sign: several rows hold the maximum
constexpr int32_t kNotANumber = kShared;  // in what is kept: ~0x7fffffff, a row that no sequence has
constexpr int64_t kRows = 8;         // read together: accumulators then cost an eighth of a load and store per value
constexpr int64_t kLine = 64;        // columns per step; a multiple of a cache line for every type
constexpr int64_t kGrain = 1 << 14;  // values per task: about four microseconds
constexpr int64_t kCached = 1 << 24; // bytes: a result above this leaves the caches before anybody reads it

template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(c10::BFloat16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.x) << 16); }

// By arithmetic and not by c10, whose conversion branches and so keeps the loop from being vectorised. Shifted into place,
// the exponent is 112 too small; infinity and NaN come out as 2^16 and more, and get the exponent that they had.
inline float widen(c10::Half value) {
  const int32_t magnitude = (value.x & 0x7fff) << 13;
  const int32_t special = (0x0f7fffff - magnitude) >> 31 & 0x7f800000;
  const int32_t sign = static_cast<int32_t>(static_cast<uint32_t>(value.x & 0x8000) << 16);
  return std::bit_cast<float>(std::bit_cast<int32_t>(std::bit_cast<float>(magnitude) * 0x1p112f) | special | sign);
}

// Accumulators of one sequence, a value per column.
template <typename W>
struct Sums {
  explicit Sums(int64_t columns) : total(columns), top(columns), peak(columns) {}
  void clear() {
    std::fill(total.begin(), total.end(), W(0));
    std::fill(top.begin(), top.end(), -std::numeric_limits<W>::infinity());
    std::fill(peak.begin(), peak.end(), 0);
  }
  std::vector<W> total, top;
  std::vector<int32_t> peak;
};

// Adds `rows` (a constant, so that the inner loop unrolls) rows from `first` on; sums them as a chain of their own, which
// keeps long sums exact to about (L / rows) · eps.
template <int rows, typename T, typename W>
[[gnu::always_inline]] inline void add(const T* __restrict__ x, int64_t stride, int64_t columns, int32_t first, W* __restrict__ total,
                                       W* __restrict__ top, int32_t* __restrict__ peak) {
  for (int64_t c = 0; c < columns; ++c) {
    W sum = 0, best = top[c];
    int32_t where = peak[c];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const W value = widen(x[r * stride + c]);
      sum += value;
      where = value == best ? where | kShared : where;
      where = value > best ? first + r : where;
      best = value > best ? value : best;
    }
    total[c] += sum;
    top[c] = best;
    peak[c] = where;
  }
}

template <typename T, typename W>
[[gnu::always_inline]] inline void accumulate(const T* x, int64_t stride, int64_t length, int64_t columns, W* total, W* top,
                                              int32_t* peak) {
  int64_t row = 0;
  for (; row + kRows <= length; row += kRows) add<kRows>(x + row * stride, stride, columns, row, total, top, peak);
  for (; row < length; ++row) add<1>(x + row * stride, stride, columns, row, total, top, peak);
}

template <typename T, typename W>
void accumulate_any(const T* x, int64_t stride, int64_t length, int64_t columns, W* total, W* top, int32_t* peak) {
  accumulate(x, stride, length, columns, total, top, peak);
}

#if defined(__x86_64__)
template <typename T, typename W>
[[gnu::target("avx2")]] void accumulate_avx2(const T* x, int64_t stride, int64_t length, int64_t columns, W* total, W* top,
                                             int32_t* peak) {
  accumulate(x, stride, length, columns, total, top, peak);
}
#endif

template <typename T, typename W>
auto accumulator() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return &accumulate_avx2<T, W>;
#endif
  return &accumulate_any<T, W>;
}

// Packed rows and the sequences they belong to.
struct Packed {
  Packed(const at::Tensor& x, const at::Tensor& cu_seqlens)
      : rows(x.dim() == 2 && x.stride(1) == 1 ? x : x.contiguous()), bounds(cu_seqlens.to(at::kLong).contiguous()) {
    TORCH_CHECK(x.dim() == 2 && bounds.dim() == 1 && bounds.numel() > 0, "max_mean_pool: x must be [t, d] and cu_seqlens [b + 1], not ",
                x.sizes(), " and ", cu_seqlens.sizes());
    t = x.size(0), d = x.size(1), b = bounds.numel() - 1;
    cu = bounds.const_data_ptr<int64_t>();
    TORCH_CHECK(cu[0] == 0 && cu[b] == t, "max_mean_pool: cu_seqlens runs from ", cu[0], " to ", cu[b], ", must from 0 to the ", t,
                " rows of x");
    for (int64_t i = 0; i < b; ++i) {
      longest = std::max(longest, length(i));
      TORCH_CHECK(length(i) >= 0, "max_mean_pool: cu_seqlens falls from ", cu[i], " to ", cu[i + 1], "; boundaries must not fall");
    }
    TORCH_CHECK(longest < std::numeric_limits<int32_t>::max(), "max_mean_pool: a sequence of ", longest, " rows is too long");
  }
  int64_t length(int64_t i) const { return cu[i + 1] - cu[i]; }
  int64_t sequence_of(int64_t row) const { return std::upper_bound(cu, cu + b + 1, row) - cu - 1; }

  at::Tensor rows, bounds;
  const int64_t* cu;
  int64_t t, d, b, longest = 0;
};

template <typename T>
void pool(const Packed& in, T* out, int32_t* peaks, int64_t sequence, int64_t begin, int64_t end, Sums<typename Wide<T>::type>& sums) {
  using W = typename Wide<T>::type;
  const int64_t length = in.length(sequence), stride = in.rows.stride(0);
  sums.clear();
  accumulator<T, W>()(in.rows.const_data_ptr<T>() + in.cu[sequence] * stride + begin, stride, length, end - begin, sums.total.data(),
                      sums.top.data(), sums.peak.data());
  for (int64_t c = begin; c < end; ++c) {
    const W pooled = length == 0 ? W(0) : sums.top[c - begin] + sums.total[c - begin] / static_cast<W>(length);
    const int32_t peak = sums.peak[c - begin];
    out[sequence * in.d + c] = static_cast<T>(pooled);
    peaks[sequence * in.d + c] = std::isnan(pooled) ? kNotANumber : peak < 0 ? ~(peak ^ kShared) : peak;
  }
}

// Tasks are even shares of the rows (whole sequences), or of the columns where one sequence is longer than such a share.
template <typename T>
void forward(const Packed& in, T* out, int32_t* peaks) {
  using W = typename Wide<T>::type;
  const int64_t threads = at::get_num_threads();
  if (in.longest * threads > in.t + in.longest) {
    const int64_t lines = (in.d + kLine - 1) / kLine;
    at::parallel_for(0, lines, std::max<int64_t>(1, kGrain / (kLine * std::max<int64_t>(in.t, 1))), [&](int64_t first, int64_t last) {
      const int64_t begin = first * kLine, end = std::min(last * kLine, in.d);
      Sums<W> sums(end - begin);
      for (int64_t i = 0; i < in.b; ++i) pool(in, out, peaks, i, begin, end, sums);
    });
    return;
  }
  at::parallel_for(0, in.t + in.b, std::max<int64_t>(1, kGrain / std::max<int64_t>(in.d, 1)), [&](int64_t first, int64_t last) {
    Sums<W> sums(in.d);  // sequence i weighs its length + 1, so that an empty one has an owner too
    const auto before = [&](int64_t i) { return in.cu[i] + i; };
    int64_t i = *std::ranges::partition_point(std::views::iota(int64_t{0}, in.b), [&](int64_t k) { return before(k) < first; });
    for (; i < in.b && before(i) < last; ++i) pool(in, out, peaks, i, 0, in.d, sums);
  });
}

// The gradient of one sequence: every row is `low`, but `high` where it holds the maximum of its column.
template <typename T>
class Gradient {
 public:
  Gradient(const Packed& in, const T* grad, const int32_t* peaks)
      : in_(in), grad_(grad), peaks_(peaks), x_(in.rows.const_data_ptr<T>()), stride_(in.rows.stride(0)), low_(in.d), high_(in.d),
        row_(in.d), columns_(in.d) {}

  // Writes rows [begin, end) of `sequence`, counted from its first.
  void write(int64_t sequence, int64_t begin, int64_t end, T* dx, bool stream) {
    first_ = x_ + in_.cu[sequence] * stride_;
    prepare(sequence, begin, end);
    for (int64_t r = begin; r < end; ++r, dx += in_.d) {
      const auto peaking = [&](auto&& set) {
        for (int32_t k = starts_[r - begin]; k < starts_[r - begin + 1]; ++k) set(columns_[k]);
      };
      peaking([&](int32_t c) { row_[c] = high_[c]; });
      for (const Tie& tie : ties_) row_[tie.column] = at(r, tie.column) == tie.top ? high_[tie.column] : low_[tie.column];
      stream ? stream_copy(dx, row_.data(), sizeof(T) * in_.d) : void(std::memcpy(dx, row_.data(), sizeof(T) * in_.d));
      peaking([&](int32_t c) { row_[c] = low_[c]; });
    }
  }

 private:
  using W = typename Wide<T>::type;
  struct Tie {
    int32_t column;
    W top, count;
  };

  W at(int64_t row, int64_t column) const { return widen(first_[row * stride_ + column]); }

  void prepare(int64_t sequence, int64_t begin, int64_t end) {
    const int64_t length = in_.length(sequence);
    const T* grad = grad_ + sequence * in_.d;
    const int32_t* peak = peaks_ + sequence * in_.d;
    ties_.clear();
    starts_.assign(end - begin + 2, 0);
    for (int64_t c = 0; c < in_.d; ++c) {
      const W mean = widen(grad[c]) / static_cast<W>(length);
      low_[c] = static_cast<T>(peak[c] == kNotANumber ? std::numeric_limits<W>::quiet_NaN() : mean);
      high_[c] = static_cast<T>(mean + widen(grad[c]));
      if (peak[c] >= begin && peak[c] < end) ++starts_[peak[c] - begin + 2];
      if (peak[c] < 0 && peak[c] != kNotANumber) ties_.push_back({static_cast<int32_t>(c), at(~peak[c], c), W(0)});
    }
    row_ = low_;
    for (int64_t r = 0; r < end - begin; ++r) starts_[r + 2] += starts_[r + 1];
    for (int64_t c = 0; c < in_.d; ++c)
      if (peak[c] >= begin && peak[c] < end) columns_[starts_[peak[c] - begin + 1]++] = static_cast<int32_t>(c);
    for (int64_t r = 0; r < length && !ties_.empty(); ++r)
      for (Tie& tie : ties_) tie.count += at(r, tie.column) == tie.top;
    for (const Tie& tie : ties_) {
      const W wide = widen(grad[tie.column]);
      high_[tie.column] = static_cast<T>(wide / static_cast<W>(length) + wide / tie.count);
    }
  }

  const Packed& in_;
  const T* grad_;
  const int32_t* peaks_;
  const T *x_, *first_ = nullptr;
  const int64_t stride_;
  std::vector<T> low_, high_, row_;
  std::vector<int32_t> columns_, starts_;  // columns by the row of their maximum, counting sort
  std::vector<Tie> ties_;
};

template <typename T>
void backward(const Packed& in, const T* grad, const int32_t* peaks, T* dx) {
  const bool stream = sizeof(T) * in.t * in.d > kCached;
  if (stream) prefer_huge_pages(dx, sizeof(T) * in.t * in.d);
  at::parallel_for(0, in.t, std::max<int64_t>(1, kGrain / std::max<int64_t>(in.d, 1)), [&](int64_t first, int64_t last) {
    Gradient<T> gradient(in, grad, peaks);
    for (int64_t i = in.sequence_of(first), row = first; row < last; row = in.cu[++i]) {
      if (in.length(i) == 0) continue;
      gradient.write(i, row - in.cu[i], std::min(last, in.cu[i + 1]) - in.cu[i], dx + row * in.d, stream);
    }
    if (stream) fence();
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> max_mean_pool_cpu(const at::Tensor& x, const at::Tensor& cu_seqlens) {
  const Packed in(x, cu_seqlens);
  at::Tensor out = at::empty({in.b, in.d}, x.options()), peak = at::empty({in.b, in.d}, x.options().dtype(at::kInt));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "max_mean_pool", [&] {
    forward<scalar_t>(in, out.mutable_data_ptr<scalar_t>(), peak.mutable_data_ptr<int32_t>());
  });
  return {out, peak};
}

at::Tensor max_mean_pool_backward_cpu(const at::Tensor& grad, const at::Tensor& peak, const at::Tensor& x,
                                      const at::Tensor& cu_seqlens) {
  const Packed in(x, cu_seqlens);
  const at::Tensor g = grad.contiguous(), p = peak.contiguous();
  TORCH_CHECK(g.scalar_type() == x.scalar_type() && g.dim() == 2 && g.size(0) == in.b && g.size(1) == in.d && p.sizes() == g.sizes(),
              "max_mean_pool: the gradient is ", g.scalar_type(), " ", g.sizes(), " of peaks ", p.sizes(), ", must be ", x.scalar_type(), " [",
              in.b, ", ", in.d, "]");
  at::Tensor dx = at::empty({in.t, in.d}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "max_mean_pool_backward", [&] {
    backward<scalar_t>(in, g.const_data_ptr<scalar_t>(), p.const_data_ptr<int32_t>(), dx.mutable_data_ptr<scalar_t>());
  });
  return dx;
}

}  // namespace emoscale
