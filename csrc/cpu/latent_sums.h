// Sums per latent over the entries that chose it: the weight gradients of encoder and decoder.
//
// The entries (row n, slot j) of a block of rows are put in latent order by one stable counting sort, which serves every sum
// over them. The rows are read in slices of columns, each copied to where it lies densely in the second-level cache: a row is
// gathered once per entry, but from there. Each latent's entries are summed in their order, in registers, by one thread, so
// the result has the same bits on any number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <type_traits>

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

// start[f] .. start[f + 1] are latent f's entries, ascending: slot[i] of row[i].
struct LatentOrder {
  int64_t n, k, d_sae;
  Buffer<uint32_t> row, slot;
  Buffer<int64_t> start;

  LatentOrder(const int32_t* indices, int64_t rows, int64_t k, int64_t d_sae)
      : n(rows * k), k(k), d_sae(d_sae), row(n), slot(n), start(d_sae + 1) {
    const int64_t workers = std::clamp<int64_t>(n / 16384, 1, num_threads());
    Buffer<int64_t> at(workers * d_sae);  // first counts, then each worker's next place
    std::fill(at.p, at.p + workers * d_sae, 0);
    const auto range = [&](int64_t w) { return rows * w / workers; };
    parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w)
        for (int64_t e = range(w) * k; e < range(w + 1) * k; ++e) ++at[w * d_sae + indices[e]];
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
        for (int64_t r = range(w); r < range(w + 1); ++r)
          for (int64_t j = 0; j < k; ++j) {
            const int64_t place = at[w * d_sae + indices[r * k + j]]++;
            row[place] = static_cast<uint32_t>(r);
            slot[place] = static_cast<uint32_t>(j);
          }
    });
  }

  // f(i, number of the entry) for every place i of the order
  template <class F> void each(const F& f) const {
    parallel_for(0, n, 32768, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i, static_cast<int64_t>(row[i]) * k + slot[i]);
    });
  }
};

template <class T> inline void prefetch_row(const T* row, int64_t d) {
  for (int64_t c = 0; c < d; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + c);
}

constexpr int kSliceVecs = 4;
template <class A> constexpr int64_t kSlice = kSliceVecs * kLanes<A>;  // columns

// Calls f with the smallest number of vectors (1, 2 or 4) that holds the columns, as a constant.
template <class A, class F> inline void with_vecs(int64_t columns, const F& f) {
  if (columns <= kLanes<A>) f.template operator()<1>();
  else if (columns <= 2 * kLanes<A>) f.template operator()<2>();
  else f.template operator()<kSliceVecs>();
}

// Columns c0 .. c0 + width of rows [n, d] to packed [n, stride], in the accumulator type, filled up with zeros.
template <class T>
inline void pack_slice(const T* rows, int64_t n, int64_t d, int64_t c0, int64_t width, int64_t stride, Acc<T>* packed) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<A>;
  parallel_for(0, n, 256, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* from = rows + r * d + c0;
      A* to = packed + r * stride;
      int64_t c = 0;
      for (; c + L <= width; c += L) store(to + c, load(from + c));
      for (; c < width; ++c) to[c] = to_acc(from[c]);
      for (; c < stride; ++c) to[c] = A(0);
    }
  });
}

// total[b] += sum_i weight[i] * rows[row[i]][b], and with Dots dot[i] += <rows[row[i]], w>, over n entries and B vectors.
template <bool Dots, int B, class A>
inline void sum_entries(const A* rows, int64_t stride, const uint32_t* row, const A* weight, int64_t n, const Vec<A> (&w)[B],
                        Vec<A> (&total)[B], A* dot) {
  constexpr int L = kLanes<A>, kGroup = 4;
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) {
    Vec<A> sums[kGroup];
#pragma GCC unroll 4
    for (int j = 0; j < kGroup; ++j) {
      const A* p = rows + row[i + j] * stride;
      const Vec<A> scale = splat(weight[i + j]);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        const Vec<A> v = load(p + b * L);
        total[b] += scale * v;
        if (Dots) sums[j] = b == 0 ? v * w[b] : sums[j] + v * w[b];
      }
    }
    if (Dots)
#pragma GCC unroll 4
      for (int j = 0; j < kGroup; ++j) dot[i + j] += horizontal_sum<A>(sums[j]);
  }
  for (; i < n; ++i) {
    const A* p = rows + row[i] * stride;
    Vec<A> sum{};
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const Vec<A> v = load(p + b * L);
      total[b] += weight[i] * v;
      if (Dots) sum += v * w[b];
    }
    if (Dots) dot[i] += horizontal_sum<A>(sum);
  }
}

// sums[f] = sum over f's entries of weight * (rows[row] - centre); totals[f] = sum of the weights; dots with W[f].
// rows [n, d]; W, sums [d_sae, d]; centre [d]. W, centre and totals may be null; centre needs totals. Blocks of rows are added
// in turn, those of a narrow T in `wide` [d_sae, d], which may be null where there is one block.
template <class T> struct LatentSums {
  const T* W; const T* centre;
  int64_t d;
  T* sums; Acc<T>* wide; Acc<T>* totals;
};

// One block: weights, and dots (added to) where W is given, stand in the order; row[i] is entry i's among the n rows.
struct Block {
  const LatentOrder& order;
  const uint32_t* row;
  bool first, last;
};

// Latent f's B vectors at column c0; where Part, fewer columns than that exist. rows begins at column c0; what lies `ahead`
// latents further is fetched.
template <bool Dots, int B, bool Part, int64_t ahead, class T>
void sum_latent(const LatentSums<T>& to, const Block& block, int64_t f, const Acc<T>* weights, const Acc<T>* rows, int64_t stride,
                int64_t c0, Acc<T>* dots) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  constexpr int64_t kSpan = 256;  // entries per partial sum
  const int64_t width = std::min<int64_t>(B * L, to.d - c0), at = f * to.d + c0;
  const int64_t begin = block.order.start[f], end = block.order.start[f + 1];
  const auto read = [&](const auto* from, Vec<A> (&v)[B]) {
    for (int b = 0; b < B; ++b) v[b] = Part ? load_some(from + b * L, width - b * L) : load(from + b * L);
  };
  const auto write = [&](auto* out, const Vec<A> (&v)[B]) {
    for (int b = 0; b < B; ++b) Part ? store_some(out + b * L, v[b], width - b * L) : store(out + b * L, v[b]);
  };
  Vec<A> w[B] = {}, total[B] = {};
  if (ahead && f + ahead < block.order.d_sae) {
    if (Dots) prefetch_row(to.W + at + ahead * to.d, width);
    prefetch_row(to.sums + at + ahead * to.d, width);
  }
  if (Dots && begin < end) read(to.W + at, w);
  A weight_sum = 0;
  for (int64_t s = begin; s < end; s += kSpan) {
    const int64_t n = std::min(kSpan, end - s);
    Vec<A> part[B] = {};
    sum_entries<Dots, B>(rows, stride, block.row + s, weights + s, n, w, part, dots + s);
    for (int b = 0; b < B; ++b) total[b] += part[b];
    if (to.totals && c0 == 0) {
      A span = 0;
      for (int64_t i = s; i < s + n; ++i) span += weights[i];
      weight_sum += span;
    }
  }
  if (to.totals && c0 == 0) to.totals[f] = block.first ? weight_sum : to.totals[f] + weight_sum;
  if (!block.first) {
    Vec<A> before[B];
    to.wide ? read(to.wide + at, before) : read(to.sums + at, before);
    for (int b = 0; b < B; ++b) total[b] = before[b] + total[b];
  }
  if (block.last && to.centre) {
    Vec<A> centre[B];
    read(to.centre + c0, centre);
    for (int b = 0; b < B; ++b) total[b] -= to.totals[f] * centre[b];
  }
  to.wide && !block.last ? write(to.wide + at, total) : write(to.sums + at, total);
}

// Adds one block of n rows: slice by slice for all latents, or, where latents are met so seldom that reading W and writing
// the sums is most of the work, latent by latent for all columns. The bits are the same.
template <bool Dots, class T>
void sum_block(const LatentSums<T>& to, const Block& block, const Acc<T>* weights, const T* rows, int64_t n, Acc<T>* dots) {
  using A = Acc<T>;
  constexpr int64_t kStep = 64, kSeldom = 2;  // latents per task; entries per latent
  const int64_t d = to.d, d_sae = block.order.d_sae;
  const auto each_latent = [&](int64_t columns, const auto& f) {
    const int64_t workers = std::clamp<int64_t>((block.order.n + d_sae) * columns / 65536, 1, num_threads());
    share_out((d_sae + kStep - 1) / kStep, workers, [&](int64_t, int64_t task) {
      for (int64_t l = task * kStep; l < std::min(d_sae, (task + 1) * kStep); ++l) f(l);
    });
  };
  const auto each_slice = [&](const auto& f) {
    for (int64_t c0 = 0; c0 == 0 || c0 < d; c0 += kSlice<A>)
      with_vecs<A>(std::min(kSlice<A>, d - c0), [&]<int B>() {
        d - c0 < B * kLanes<A> ? f.template operator()<B, true>(c0) : f.template operator()<B, false>(c0);
      });
  };
  if (block.order.n < kSeldom * d_sae) {
    const int64_t stride = (d + kSlice<A> - 1) / kSlice<A> * kSlice<A>;
    const bool as_it_is = std::is_same_v<T, A> && d == stride;
    Buffer<A> packed(as_it_is ? 0 : n * stride);
    if (!as_it_is) pack_slice(rows, n, d, 0, d, stride, packed.p);
    const A* wide = as_it_is ? reinterpret_cast<const A*>(rows) : packed.p;
    each_latent(d, [&](int64_t f) {
      each_slice([&]<int B, bool Part>(int64_t c0) { sum_latent<Dots, B, Part, 0>(to, block, f, weights, wide + c0, stride, c0, dots); });
    });
    return;
  }
  Buffer<A> packed(n * kSlice<A>);
  each_slice([&]<int B, bool Part>(int64_t c0) {
    constexpr int64_t stride = B * kLanes<A>;
    const bool as_it_is = std::is_same_v<T, A> && d == stride;
    if (!as_it_is) pack_slice(rows, n, d, c0, std::min(stride, d - c0), stride, packed.p);
    const A* slice = as_it_is ? reinterpret_cast<const A*>(rows) : packed.p;
    each_latent(stride, [&](int64_t f) { sum_latent<Dots, B, Part, 8>(to, block, f, weights, slice, stride, c0, dots); });
  });
}

// Rows of one block: a slice of them fits the second-level cache, or nearly, and a latent is met often enough to pay for
// reading its sum once more. For a given shape it is the same on every machine.
inline int64_t block_rows(int64_t rows, int64_t k, int64_t d_sae) {
  const int64_t most = std::max<int64_t>(8192, 4 * d_sae / std::max<int64_t>(k, 1)), blocks = (rows + most - 1) / most;
  return blocks < 2 ? rows : (rows + blocks - 1) / blocks;
}

// f(order, first row, rows, first?, last?) for every block; for no rows at all one empty block, which writes the zeros.
template <class F> void each_block(const int32_t* indices, int64_t rows, int64_t k, int64_t d_sae, const F& f) {
  const int64_t step = std::max<int64_t>(1, block_rows(rows, k, d_sae));
  for (int64_t r0 = 0; r0 == 0 || r0 < rows; r0 += step) {
    const int64_t n = std::min(step, rows - r0);
    f(LatentOrder(indices + r0 * k, n, k, d_sae), r0, n, r0 == 0, r0 + n >= rows);
  }
}

}  // namespace SK_ISA
}  // namespace sae_kernels
