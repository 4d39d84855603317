// Register tiles of pre-activations: kMR rows x kNR latents over the whole of d_in, filtered before they are stored anywhere.
#pragma once

#include "cpu/topk_select.h"

namespace sae_kernels {
namespace SK_ISA {

#if defined(__AVX512F__)
constexpr int kMR = 14;
#else
constexpr int kMR = 6;
#endif
template <class A> constexpr int kNR = 2 * kLanes<A>;

// How many words of an accumulator one row of a packed tile takes: its numbers, widened, or (Pairs) two bf16 to the word.
template <bool Pairs> inline int64_t words(int64_t d_in) { return Pairs ? (d_in + 1) / 2 : d_in; }

// out[c * Width + r] = rows[r][c]; rows beyond n are zero
template <int Width, class T>
inline void pack(const T* const* rows, int n, int64_t d_in, Acc<T>* out) {
  constexpr int64_t kStep = 16;  // one cache line of each row at a time
  for (int64_t c0 = 0; c0 < d_in; c0 += kStep) {
    const int64_t c1 = std::min(c0 + kStep, d_in);
    for (int r = 0; r < Width; ++r) {
      if (r < n) for (int64_t c = c0; c < c1; ++c) out[c * Width + r] = to_acc(rows[r][c]);
      else for (int64_t c = c0; c < c1; ++c) out[c * Width + r] = Acc<T>(0);
    }
  }
}

// The same, numbers 2 c and 2 c + 1 side by side in a word.
template <int Width>
inline void pack_pairs(const bf16* const* rows, int n, int64_t d_in, float* out) {
  constexpr int64_t kStep = 16;
  const int64_t whole = d_in / 2;
  for (int64_t c0 = 0; c0 < whole; c0 += kStep) {
    const int64_t c1 = std::min(c0 + kStep, whole);
    for (int r = 0; r < Width; ++r)
      for (int64_t c = c0; c < c1; ++c) {
        if (r < n) std::memcpy(out + c * Width + r, rows[r] + 2 * c, sizeof(float));
        else out[c * Width + r] = 0;
      }
  }
  for (int r = 0; d_in % 2 && r < Width; ++r) {
    const bf16 last[2] = {r < n ? rows[r][d_in - 1] : bf16{}, {}};
    std::memcpy(out + whole * Width + r, last, sizeof last);
  }
}

// bit i set: lane i is at or above the threshold, or NaN
template <class A> inline uint32_t at_least(Vec<A> score, A threshold) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_cmp_ps_mask((__m512)score, _mm512_set1_ps(threshold), _CMP_NLT_UQ);
  else return _mm512_cmp_pd_mask((__m512d)score, _mm512_set1_pd(threshold), _CMP_NLT_UQ);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)score, _mm256_set1_ps(threshold), _CMP_NLT_UQ));
  else return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)score, _mm256_set1_pd(threshold), _CMP_NLT_UQ));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes<A>; ++i) mask |= uint32_t(!(score[i] < threshold)) << i;
  return mask;
#endif
}

// bit i set: lane i is above its threshold, or NaN
template <class A> inline uint32_t above(Vec<A> score, Vec<A> thresholds) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_cmp_ps_mask((__m512)score, (__m512)thresholds, _CMP_NLE_UQ);
  else return _mm512_cmp_pd_mask((__m512d)score, (__m512d)thresholds, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return _mm256_movemask_ps(_mm256_cmp_ps((__m256)score, (__m256)thresholds, _CMP_NLE_UQ));
  else return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)score, (__m256d)thresholds, _CMP_NLE_UQ));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes<A>; ++i) mask |= uint32_t(!(score[i] <= thresholds[i])) << i;
  return mask;
#endif
}

template <class A> inline Vec<A> magnitude(Vec<A> v) { return v < Vec<A>{} ? -v : v; }

// acc + a x b, where a word holds two bf16. In assembly, so that the same unit runs where this instruction is missing.
template <class A> inline __attribute__((always_inline)) Vec<A> add_pairs(Vec<A> acc, const A* a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) asm("vdpbf16ps %1%{1to16%}, %2, %0" : "+v"(acc) : "m"(*a), "v"(b));
#endif
  return acc;
}

// acc[r][v] = bias + sum_c a[c][r] * b[c][v], over `steps` words
template <bool Pairs, class A>
inline __attribute__((always_inline)) void multiply(const A* a, const A* b, const A* bias, int64_t steps, Vec<A> (&acc)[kMR][2]) {
  constexpr int L = kLanes<A>;
#pragma GCC unroll 16
  for (int r = 0; r < kMR; ++r) {
    acc[r][0] = load(bias);
    acc[r][1] = load(bias + L);
  }
  for (int64_t c = 0; c < steps; ++c, a += kMR, b += 2 * L) {
    const Vec<A> b0 = load(b), b1 = load(b + L);
#pragma GCC unroll 16
    for (int r = 0; r < kMR; ++r) {
      if constexpr (Pairs) {
        acc[r][0] = add_pairs<A>(acc[r][0], a + r, b0);
        acc[r][1] = add_pairs<A>(acc[r][1], a + r, b1);
      } else {
        acc[r][0] += a[r] * b0;
        acc[r][1] += a[r] * b1;
      }
    }
  }
}

template <class A> struct Panel {  // NR packed latents
  const A* weights;
  const A* bias;
  const A* thresholds;  // null: none but the running ones
  const int32_t* latents;
  int n;
};

// The lanes of a register tile's row that are above the threshold, or at it where a lower latent wins, become candidates.
// All lanes in `mask` are counted in `passed`, unless that is null.
template <class A>
__attribute__((noinline)) void collect(const Vec<A> (&score)[2], uint32_t mask, uint32_t negative, const Panel<A>& panel, Row<A>& row,
                                       int32_t* passed, const Candidates<A>& candidates, int64_t k) {
  constexpr int L = kLanes<A>;
  if (panel.n < kNR<A>) mask &= (1u << panel.n) - 1;
  if (passed) *passed += __builtin_popcount(mask);
  const bool ties_win = panel.latents[0] < row.threshold_latent;
  for (int half = 0; half < 2; ++half) {
    const uint32_t lanes = mask >> half * L & ((1u << L) - 1);
    if (!lanes) continue;
    const Vec<Rank<A>> ranks = rank_of<A>(score[half]);
    const uint32_t better = ties_win ? mask_of<A>(ranks >= row.threshold_rank) : mask_of<A>(ranks > row.threshold_rank);
    row.append(ranks, better & lanes, negative >> half * L, panel.latents + half * L, candidates);
  }
  row.make_room(candidates, k, 2 * L);
}

// Maxima of disjoint, strided groups of ranks, at least 4 k of them; returns how many.
template <class A> inline int64_t fold(const Rank<A>* ranks, int64_t width, int64_t k, Rank<A>* maxima) {
  int64_t groups = width;
  while (groups % (2 * kLanes<A>) == 0 && groups / 2 >= 4 * k) groups /= 2;
  for (int64_t i = 0; i < groups; i += kLanes<A>) {
    Vec<Rank<A>> best = load_ranks<A>(ranks + i);
    for (int64_t j = i + groups; j < width; j += groups) {
      const Vec<Rank<A>> v = load_ranks<A>(ranks + j);
      best = v > best ? v : best;
    }
    std::memcpy(maxima + i, &best, sizeof best);
  }
  return groups;
}

// The first panels of a tile, while every row's threshold still lies at the floor: all their ranks are kept in cache, and
// the row starts with the best of them, at a few vector operations per panel.
template <class A, bool Abs, bool Pairs>
void seed_tile(const A* tile, int64_t rows, const Panel<A>* panels, int64_t n_panels, int64_t steps, Row<A>* state,
               const Candidates<A>& candidates, int64_t k, Rank<A>* ranks) {
  constexpr int L = kLanes<A>, NR = kNR<A>;
  const int64_t width = n_panels * NR;
  Rank<A>* maxima = ranks + kMR * width;
  uint32_t* negative = reinterpret_cast<uint32_t*>(maxima + width);
  for (int64_t r0 = 0; r0 < rows; r0 += kMR) {
    const int n = static_cast<int>(std::min<int64_t>(kMR, rows - r0));
    for (int64_t p = 0; p < n_panels; ++p) {
      Vec<A> acc[kMR][2];
      multiply<Pairs, A>(tile + r0 * steps, panels[p].weights, panels[p].bias, steps, acc);
#pragma GCC unroll 16
      for (int r = 0; r < kMR; ++r) {
        const Vec<Rank<A>> first = rank_of<A>(Abs ? magnitude<A>(acc[r][0]) : acc[r][0]);
        const Vec<Rank<A>> second = rank_of<A>(Abs ? magnitude<A>(acc[r][1]) : acc[r][1]);
        std::memcpy(ranks + r * width + p * NR, &first, sizeof first);
        std::memcpy(ranks + r * width + p * NR + L, &second, sizeof second);
        if (Abs) negative[r * n_panels + p] = ~(at_least<A>(acc[r][0], A(0)) | at_least<A>(acc[r][1], A(0)) << L);
      }
      for (int i = panels[p].n; i < NR; ++i)
        for (int r = 0; r < kMR; ++r) ranks[r * width + p * NR + i] = std::numeric_limits<Rank<A>>::min();
    }
    for (int r = 0; r < n; ++r) {
      Row<A>& row = state[r0 + r];
      const Candidates<A> mine = candidates.row(r0 + r);
      Rank<A>* all = ranks + r * width;
      const Rank<A> floor = row.threshold_rank + 1;
      // k maxima of disjoint groups reach the bound, so k ranks do; what ties with it is sorted out by latent later
      int64_t groups = fold<A>(all, width, k, maxima);
      if (count_at_least<A>(maxima, groups, floor) >= k)
        row.raise(std::max(separate<A>(maxima, groups, k, k / 4).rank, floor), std::numeric_limits<int32_t>::max());
      for (int64_t p = 0; p < n_panels; ++p)
        for (int half = 0; half < 2; ++half) {
          const Vec<Rank<A>> v = load_ranks<A>(all + p * NR + half * L);
          const uint32_t above = row.threshold_latent < 0 ? mask_of<A>(v > row.threshold_rank) : mask_of<A>(v >= row.threshold_rank);
          row.append(v, above, Abs ? negative[r * n_panels + p] >> half * L : 0, panels[p].latents + half * L, mine);
          row.make_room(mine, k, L);
        }
    }
  }
}

// One tile of rows against one block of panels. Fixed: the panels' own thresholds decide who is a candidate, and `passed`
// counts them per row; else the rows' running ones do.
template <class A, bool Abs, bool Pairs, bool Fixed>
void filter_tile(const A* tile, int64_t rows, const Panel<A>* panels, int64_t n_panels, int64_t steps, Row<A>* state,
                 int32_t* passed, const Candidates<A>& candidates, int64_t k) {
  for (int64_t p = 0; p < n_panels; ++p) {
    for (int64_t r0 = 0; r0 < rows; r0 += kMR) {
      Vec<A> acc[kMR][2];
      multiply<Pairs, A>(tile + r0 * steps, panels[p].weights, panels[p].bias, steps, acc);
      const int n = static_cast<int>(std::min<int64_t>(kMR, rows - r0));
#pragma GCC unroll 16
      for (int r = 0; r < kMR; ++r) {
        if (r >= n) break;
        Row<A>& row = state[r0 + r];
        const Vec<A> s0 = Abs ? magnitude<A>(acc[r][0]) : acc[r][0], s1 = Abs ? magnitude<A>(acc[r][1]) : acc[r][1];
        uint32_t mask;
        if constexpr (Fixed)
          mask = above<A>(s0, load(panels[p].thresholds)) | above<A>(s1, load(panels[p].thresholds + kLanes<A>)) << kLanes<A>;
        else mask = at_least<A>(s0, row.threshold) | at_least<A>(s1, row.threshold) << kLanes<A>;
        if (__builtin_expect(mask != 0, 0)) {
          const Vec<A> score[2] = {s0, s1};  // a copy: acc itself must stay in registers
          const uint32_t positive = Abs ? at_least<A>(acc[r][0], A(0)) | at_least<A>(acc[r][1], A(0)) << kLanes<A> : ~0u;
          collect<A>(score, mask, ~positive, panels[p], row, Fixed ? passed + r0 + r : nullptr, candidates.row(r0 + r), k);
        }
      }
    }
  }
}

}  // namespace SK_ISA
}  // namespace sae_kernels
