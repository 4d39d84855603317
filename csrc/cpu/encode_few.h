// A request of a few rows: dot products straight from W_enc, as many at a time as a vector has lanes.
#pragma once

#include <utility>

#include "cpu/encode_args.h"
#include "cpu/topk_tiles.h"

namespace sae_kernels {
namespace SK_ISA {

// Of two vectors in blocks of 2 W lanes: block by block the first (or second) W lanes of a, then those of b.
template <class A, int W, bool Second, size_t... Lane>
inline Vec<A> halves_of(Vec<A> a, Vec<A> b, std::index_sequence<Lane...>) {
  return __builtin_shufflevector(a, b, (Lane % (2 * W) < W ? Lane + Second * W : Lane + kLanes<A> - W + Second * W)...);
}

// lane i of the result: the sum of all lanes of v[i], by halves. Overwrites v.
template <class A, int W = kLanes<A> / 2>
inline __attribute__((always_inline)) Vec<A> sums_of(Vec<A> (&v)[kLanes<A>]) {
  constexpr auto lanes = std::make_index_sequence<kLanes<A>>{};
#pragma GCC unroll 8
  for (int i = 0; i < W; ++i) v[i] = halves_of<A, W, false>(v[i], v[i + W], lanes) + halves_of<A, W, true>(v[i], v[i + W], lanes);
  if constexpr (W == 1) return v[0];
  else return sums_of<A, W / 2>(v);
}

// Rows of x, widened and padded with zeros to whole vectors, and what each of them must beat: one worker's view of them.
template <class A> struct FewRows {
  const A* x;
  int64_t stride;  // of x
  Row<A>* state;
  A* bars;  // room for a vector per row: what each lane of filter_few must beat
  int32_t* passed;  // under fixed thresholds
  Candidates<A> candidates;
  FewRows from(int64_t r) const {
    return {x + r * stride, stride, state + r, bars + r * kLanes<A>, passed + r, candidates.row(r)};
  }

  template <int R> void set_bars() const {
    for (int i = 0; i < kLanes<A>; ++i) bars[i] = state[i / (kLanes<A> / R)].threshold;
  }
};

// The lanes of R rows x kLanes / R latents that reach their row's threshold become candidates; n of the latents count.
template <class A, int R>
__attribute__((noinline)) void collect_few(Vec<Rank<A>> ranks, uint32_t mask, uint32_t negative, const FewRows<A>& rows,
                                           const int32_t* latents, int n, int64_t k) {
  constexpr int L = kLanes<A>, F = L / R;
  int32_t repeated[L];
  for (int i = 0; i < L; ++i) repeated[i] = latents[i % F];
  for (int r = 0; r < R; ++r) {
    const uint32_t mine = mask & ((1u << n) - 1) << r * F;
    if (!mine) continue;
    Row<A>& row = rows.state[r];
    const Candidates<A> candidates = rows.candidates.row(r);
    const Rank<A> before = row.threshold_rank;
    const bool ties_win = latents[0] < row.threshold_latent;
    row.append(ranks, mine & (ties_win ? mask_of<A>(ranks >= before) : mask_of<A>(ranks > before)), negative, repeated, candidates);
    row.make_room(candidates, k, L);
    if (row.threshold_rank != before) rows.template set_bars<R>();
  }
}

// R rows against kLanes / R latents; n of the latents count.
template <int R, class Args, class A>
inline void filter_few(const Args& args, const FewRows<A>& rows, const int32_t* latents, int n) {
  using T = typename Args::Input;
  constexpr int L = kLanes<A>, F = L / R;
  const T* w[F];
  Vec<A> acc[L];
#pragma GCC unroll 16
  for (int f = 0; f < F; ++f) {
    w[f] = args.W + latents[f] * args.d_in;
    const Vec<A> bias = {args.bias ? to_acc(args.bias[latents[f]]) : A(0)};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r * F + f] = bias;
  }
  const auto multiply = [&](int64_t c, const Vec<A> (&wide)[F]) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<A> x = load(rows.x + r * rows.stride + c);
#pragma GCC unroll 16
      for (int f = 0; f < F; ++f) acc[r * F + f] += wide[f] * x;
    }
  };
  int64_t c = 0;
  Vec<A> wide[F];
  for (; c + L <= args.d_in; c += L) {
#pragma GCC unroll 16
    for (int f = 0; f < F; ++f) {
      wide[f] = load(w[f] + c);
      __builtin_prefetch(w[f] + c + F * args.d_in);  // the next latents' rows
    }
    multiply(c, wide);
  }
  if (c < args.d_in) {
    for (int f = 0; f < F; ++f) wide[f] = load_some(w[f] + c, args.d_in - c);
    multiply(c, wide);
  }
  const Vec<A> pre = sums_of<A>(acc), bars = load(rows.bars);
  const Vec<A> score = args.activation == kAbs ? magnitude<A>(pre) : pre;
  uint32_t mask = mask_of<A>(~(score < bars));
  if constexpr (Args::kFixed) {
    A thresholds[L];
    for (int i = 0; i < L; ++i) thresholds[i] = static_cast<A>(args.thresholds[latents[i % F]]);
    const uint32_t above = mask_of<A>(~(score <= load(thresholds)));
    for (int r = 0; r < R; ++r) rows.passed[r] += __builtin_popcount(above & ((1u << n) - 1) << r * F);
    mask &= above;
  }
  if (__builtin_expect(mask != 0, 0)) {
    const uint32_t negative = args.activation == kAbs ? mask_of<A>(pre < 0) : 0;
    collect_few<A, R>(rank_of<A>(score), mask, negative, rows, latents, n, args.k);
  }
}

// Rows [0, R), [R, 2 R) ... up to n_rows / R * R against the competitors [begin, end); returns how many rows that were.
template <int R, class Args, class A>
inline int64_t filter_blocks(const Args& args, const FewRows<A>& rows, int64_t n_rows, const Competitors& competitors, int64_t begin,
                             int64_t end) {
  constexpr int F = kLanes<A> / R;
  for (int64_t r = 0; r + R <= n_rows; r += R) rows.from(r).template set_bars<R>();
  for (int64_t i = begin; i < end; i += F) {
    const int n = static_cast<int>(std::min<int64_t>(F, end - i));
    int32_t latents[F];
    for (int f = 0; f < F; ++f) latents[f] = competitors[i + (f < n ? f : 0)];
    for (int64_t r = 0; r + R <= n_rows; r += R) filter_few<R>(args, rows.from(r), latents, n);
  }
  return n_rows / R * R;
}

template <class Args, class A>
inline void filter_run(const Args& args, const FewRows<A>& rows, int64_t n_rows, const Competitors& competitors, int64_t begin,
                       int64_t end) {
  int64_t done = 0;
  if constexpr (kLanes<A> >= 4) done = filter_blocks<4>(args, rows, n_rows, competitors, begin, end);
  done += filter_blocks<2>(args, rows.from(done), n_rows - done, competitors, begin, end);
  filter_blocks<1>(args, rows.from(done), n_rows - done, competitors, begin, end);
}

}  // namespace SK_ISA
}  // namespace sae_kernels
