// The last step of batch_topk_encode on the CPU: of every row's candidates, the best of the whole batch.
#include "cpu/latent_sums.h"
#include "cpu/topk_select.h"

namespace sae_kernels {

// values [rows, k], of which the first counts[r] of a row are candidates, best first; kept, kept_counts and threshold are filled.
template <class A> struct BatchKeepArgs {
  const A* values; const int32_t* counts;
  int64_t rows, k, total;
  bool abs;
  A* kept; int32_t* kept_counts; A* threshold;
};

namespace SK_ISA {

// Equal scores stand by the lower row, then by the place in it. Costs one scan of the candidates' ranks per bit of a rank.
template <class A> void batch_keep(const BatchKeepArgs<A>& args) {
  const auto rank_at = [&](int64_t r, int64_t j) {
    const A value = args.values[r * args.k + j];
    return rank_of<A>(args.abs && value < 0 ? -value : value);
  };
  const auto candidates_of = [&](int64_t r) { return std::min<int64_t>(args.counts[r], args.k); };
  int64_t n = 0;
  for (int64_t r = 0; r < args.rows; ++r) n += candidates_of(r);
  Rank<A> bound = std::numeric_limits<Rank<A>>::min();
  int64_t ties = 0;  // how many at the bound itself are kept
  if (n > args.total) {
    Buffer<Rank<A>> ranks(n + kLanes<A>);
    int64_t i = 0;
    for (int64_t r = 0; r < args.rows; ++r)
      for (int64_t j = 0; j < candidates_of(r); ++j) ranks[i++] = rank_at(r, j);
    bound = separate<A>(ranks.p, n, args.total, 0).rank;
    ties = args.total;
    for (i = 0; i < n; ++i) ties -= ranks[i] > bound;
  }
  Rank<A> lowest = kNanRank<A>;
  int64_t found = 0;
  for (int64_t r = 0; r < args.rows; ++r) {
    int64_t kept = 0;
    for (; kept < candidates_of(r); ++kept) {
      const Rank<A> rank = rank_at(r, kept);
      if (rank < bound || (rank == bound && ties-- <= 0)) break;
      lowest = std::min(lowest, rank);
    }
    std::copy_n(args.values + r * args.k, kept, args.kept + r * args.k);
    std::fill_n(args.kept + r * args.k + kept, args.k - kept, A(0));
    args.kept_counts[r] = static_cast<int32_t>(kept);
    found += kept;
  }
  *args.threshold = found ? score_of<A>(lowest) : A(0);
}

template void batch_keep(const BatchKeepArgs<float>&);
template void batch_keep(const BatchKeepArgs<double>&);

}  // namespace SK_ISA
}  // namespace sae_kernels

#ifdef SK_BASELINE
#include <tuple>

#include "common.h"

namespace sae_kernels {

SK_DECLARE(template <class A> void batch_keep(const BatchKeepArgs<A>& args))

std::tuple<Tensor, Tensor, Tensor> batch_keep(Tensor values, Tensor counts, int64_t total, bool abs) {
  values = dense(values);
  counts = dense(counts);
  const int64_t rows = values.size(0), k = values.size(1);
  Tensor kept = empty_like_dtype(values, {rows, k}), kept_counts = empty_as(counts, {rows}, ScalarType::Int);
  Tensor threshold = empty_like_dtype(values, {});
  with_float_type(values.scalar_type(), [&]<class T>(T) {
    if constexpr (sizeof(T) >= sizeof(float)) {
      const BatchKeepArgs<T> args{data<T>(values), data<int32_t>(counts), rows, k, total, abs,
                                  mutable_data<T>(kept), mutable_data<int32_t>(kept_counts), mutable_data<T>(threshold)};
      SK_DISPATCH(batch_keep<T>, args);
    } else {
      STD_TORCH_CHECK(false, "batch_keep: values must be float32 or float64");
    }
  });
  return {kept, kept_counts, threshold};
}

}  // namespace sae_kernels

STABLE_TORCH_LIBRARY_IMPL(sae_kernels, CPU, m) { m.impl("batch_keep", TORCH_BOX(&sae_kernels::batch_keep)); }
#endif
