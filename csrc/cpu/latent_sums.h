// Sums per latent over the entries that chose it: the weight gradients of encoder and decoder.
//
// The entries (row n, slot j), numbered e = n * k + j, are put in latent order by one stable counting sort. Each latent's
// entries are then summed in that order by one thread, so the result has the same bits on any number of threads.
// Bytes gathered: one row of d per entry, whichever sums are asked for.
#pragma once

#include <algorithm>
#include <atomic>

#include "cpu/vec.h"

namespace sae_kernels {

void* workspace(int64_t bytes);  // 64-byte aligned
void release(void* p);

namespace SK_ISA {

template <class P> struct Buffer {
  P* p;
  explicit Buffer(int64_t n) : p(static_cast<P*>(workspace(n * static_cast<int64_t>(sizeof(P))))) {}
  ~Buffer() { release(p); }
  Buffer(const Buffer&) = delete;
  P* operator+(int64_t i) const { return p + i; }
  P& operator[](int64_t i) const { return p[i]; }
};

// Runs body(worker, task) for every task, tasks handed out as workers get free.
template <class F> inline void share_out(int64_t tasks, int64_t workers, const F& body) {
  std::atomic<int64_t> next{0};
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w)
      for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(w, t);
  });
}

// start[f] .. start[f + 1] of `entries` are latent f's entry numbers, ascending.
struct LatentOrder {
  Buffer<int64_t> entries, start;

  LatentOrder(const int32_t* indices, int64_t n, int64_t d_sae) : entries(n), start(d_sae + 1) {
    const int64_t workers = std::clamp<int64_t>(n / 16384, 1, num_threads());
    Buffer<int64_t> at(workers * d_sae);  // first counts, then each worker's next place
    std::fill(at.p, at.p + workers * d_sae, 0);
    const auto range = [&](int64_t w) { return n * w / workers; };
    parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w)
        for (int64_t e = range(w); e < range(w + 1); ++e) ++at[w * d_sae + indices[e]];
    });
    int64_t total = 0;
    for (int64_t f = 0; f < d_sae; ++f) {
      start[f] = total;
      for (int64_t w = 0; w < workers; ++w) {
        const int64_t count = at[w * d_sae + f];
        at[w * d_sae + f] = total;
        total += count;
      }
    }
    start[d_sae] = total;
    parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w)
        for (int64_t e = range(w); e < range(w + 1); ++e) entries[at[w * d_sae + indices[e]]++] = e;
    });
  }
};

template <class T> inline void prefetch_row(const T* row, int64_t d) {
  for (int64_t c = 0; c < d; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + c);
}

// sum[c] += sum_i weight[i] * rows[i][c], and with Dots dot[i] = <rows[i], w>, for N rows of d columns.
template <bool Dots, int N, class T>
inline void accumulate(const T* const* rows, const Acc<T>* weight, const Acc<T>* w, int64_t d, Acc<T>* sum, Acc<T>* dot) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  Vec<A> dots[N] = {};
  int64_t c = 0;
  for (; c + L <= d; c += L) {
    Vec<A> total = load(sum + c), wide = Dots ? load(w + c) : Vec<A>{};
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const Vec<A> row = load(rows[i] + c);
      total += weight[i] * row;
      if (Dots) dots[i] += row * wide;
    }
    store(sum + c, total);
  }
  for (int i = 0; i < N; ++i)
    if (Dots) dot[i] = horizontal_sum<A>(dots[i]);
  for (; c < d; ++c)
    for (int i = 0; i < N; ++i) {
      const A value = to_acc(rows[i][c]);
      sum[c] += weight[i] * value;
      if (Dots) dot[i] += value * w[c];
    }
}

// sums[f] = sum over f's entries of weights[e] * rows[e / k]; totals[f] (unless null) = sum of weights[e]; and with Dots
// dots[e] = <rows[e / k], W[f]>. weights, dots [n_rows * k]; rows [n_rows, d]; sums, W [d_sae, d].
template <bool Dots, class T>
void latent_sums(const T* weights, const int32_t* indices, const T* rows, const T* W, int64_t n_rows, int64_t k, int64_t d,
                 int64_t d_sae, T* sums, T* totals, T* dots) {
  using A = Acc<T>;
  constexpr int64_t kGroup = 4, kSpan = 256, kAhead = 8;  // rows per pass; entries per partial sum; rows prefetched
  const LatentOrder order(indices, n_rows * k, d_sae);
  const int64_t workers = std::clamp<int64_t>((n_rows * k + d_sae) * d / 65536, 1, num_threads()), step = 16;
  const int64_t padded = (d + 15) / 16 * 16;
  Buffer<A> scratch(workers * 3 * padded);

  share_out((d_sae + step - 1) / step, workers, [&](int64_t worker, int64_t task) {
    A *partial = scratch + worker * 3 * padded, *total = partial + padded, *wide = total + padded;
    for (int64_t f = task * step; f < std::min(d_sae, (task + 1) * step); ++f) {
      const int64_t begin = order.start[f], end = order.start[f + 1];
      A weight_sum = 0;
      std::fill(total, total + d, A(0));
      if (Dots) for (int64_t c = 0; c < d; ++c) wide[c] = to_acc(W[f * d + c]);
      for (int64_t s = begin; s < end; s += kSpan) {
        A span_weight = 0;
        std::fill(partial, partial + d, A(0));
        const int64_t stop = std::min(s + kSpan, end);
        for (int64_t i = s; i < stop; i += kGroup) {
          const int n = static_cast<int>(std::min(kGroup, stop - i));
          const T* row[kGroup];
          A weight[kGroup], dot[kGroup];
          for (int j = 0; j < n; ++j) {
            const int64_t e = order.entries[i + j];
            row[j] = rows + e / k * d;
            weight[j] = to_acc(weights[e]);
            span_weight += weight[j];
            if (i + j + kAhead < end) prefetch_row(rows + order.entries[i + j + kAhead] / k * d, d);
          }
          if (n == kGroup) accumulate<Dots, kGroup>(row, weight, wide, d, partial, dot);
          else for (int j = 0; j < n; ++j) accumulate<Dots, 1>(row + j, weight + j, wide, d, partial, dot + j);
          if (Dots) for (int j = 0; j < n; ++j) dots[order.entries[i + j]] = from_acc<T>(dot[j]);
        }
        for (int64_t c = 0; c < d; ++c) total[c] += partial[c];
        weight_sum += span_weight;
      }
      for (int64_t c = 0; c < d; ++c) sums[f * d + c] = from_acc<T>(total[c]);
      if (totals) totals[f] = from_acc<T>(weight_sum);
    }
  });
}

}  // namespace SK_ISA
}  // namespace sae_kernels
