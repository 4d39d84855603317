// Rows of codes decoded: k rows of W gathered and summed in registers per row of output.
//
// Where W is larger than a cache and its rows are used often enough, it is read in slices of columns, each copied to where it
// lies densely in the cache, as latent_sums.h does with the rows.
#pragma once

#include "cpu/latent_sums.h"

namespace sae_kernels {

// values, indices [rows, k]; W [d_sae, d_out]; bias [d_out] or null. Slots up to prefixes[p] make prefix p; the last is k.
// decode_rows checks the indices as it comes to them.
template <class T> struct CodeArgs {
  const T* values; const int32_t* indices; const T* W; const T* bias;
  int64_t rows, k, d_out, d_sae;
  const int64_t* prefixes; int64_t n_prefixes;
};

namespace SK_ISA {

// Slices are worth their copy where a row of W is used very often, or else comes from memory each time.
constexpr int64_t kCachedBytes = 3 << 19, kUses = 128, kLastCacheBytes = 32 << 20, kUsesFromMemory = 8;
constexpr int64_t kAheadBytes = 12288;  // fetched ahead of use

// What is read after a row's last slot in these columns: the slots from `indices` on, `end` of them, in W.
template <class R> struct Ahead {
  const int32_t* indices; int64_t end; const R* W;
};

// total[b] += sum of value * row of slots [j, end) of k; `columns` of B vectors exist.
template <int B, bool Part, class T, class R>
inline void add_rows(const T* values, const int32_t* indices, int64_t j, int64_t end, int64_t k, const R* W, int64_t stride,
                     const Ahead<R>& then, int64_t columns, Vec<Acc<T>> (&total)[B]) {
  constexpr int64_t L = kLanes<Acc<T>>, kAhead = std::clamp<int64_t>(kAheadBytes / (B * L * sizeof(R)), 4, 16);
  constexpr int kPerLine = 64 / (L * sizeof(R));  // vectors
  const auto add = [&](const R* ahead) {
    const Vec<Acc<T>> value = splat(to_acc(values[j]));
    const R* w = W + indices[j] * stride;
#pragma GCC unroll 24
    for (int b = 0; b < B; ++b) {
      if (b % kPerLine == 0) __builtin_prefetch(ahead + b * L);
      total[b] += value * (Part ? load_some(w + b * L, columns - b * L) : load(w + b * L));
    }
  };
  for (; j < std::min(end, k - kAhead); ++j) add(W + indices[j + kAhead] * stride);
  for (; j < end; ++j) {
    const int64_t a = j + kAhead - k;
    add(a < then.end ? then.W + then.indices[a] * stride : W + indices[j] * stride);
  }
}

// Columns [c0, c0 + columns) of one row; W begins at column c0. done(prefix, c0, total, columns) after each prefix.
template <int B, bool Part, class T, class R, class F>
inline void decode_columns(const CodeArgs<T>& args, int64_t row, const R* W, int64_t stride, const Ahead<R>& then, int64_t c0,
                           int64_t columns, const F& done) {
  constexpr int64_t L = kLanes<Acc<T>>;
  const T* values = args.values + row * args.k;
  const int32_t* indices = args.indices + row * args.k;
  Vec<Acc<T>> total[B] = {};
  if (args.bias)
#pragma GCC unroll 24
    for (int b = 0; b < B; ++b) total[b] = Part ? load_some(args.bias + c0 + b * L, columns - b * L) : load(args.bias + c0 + b * L);
  int64_t j = 0;
  for (int64_t p = 0; p < args.n_prefixes; j = args.prefixes[p++]) {
    add_rows<B, Part>(values, indices, j, args.prefixes[p], args.k, W, stride, then, columns, total);
    done.template operator()<B, Part>(row, p, c0, total, columns);
  }
}

// The slots of the rows behind this one.
template <class T, class R> inline Ahead<R> next_rows(const CodeArgs<T>& args, int64_t row, const R* W) {
  return {args.indices + (row + 1) * args.k, (args.rows - row - 1) * args.k, W};
}

template <class T, class F> inline void decode_row(const CodeArgs<T>& args, int64_t row, const F& done) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t d = args.d_out;
  int64_t c = 0;
  const auto pass = [&]<int B, bool Part>() {
    const int64_t columns = std::min(B * L, d - c), after = c + columns;
    const Ahead<T> again{args.indices + row * args.k, args.k, args.W + after};
    decode_columns<B, Part>(args, row, args.W + c, d, after < d ? again : next_rows(args, row, args.W), c, columns, done);
    c = after;
  };
  // as few passes as the registers allow
  if constexpr (kVecBytes == 64) {
    while (d - c >= 24 * L) pass.template operator()<24, false>();
    while (d - c >= 16 * L) pass.template operator()<16, false>();
  }
  while (d - c >= 8 * L) pass.template operator()<8, false>();
  while (d - c >= 4 * L) pass.template operator()<4, false>();
  while (d - c >= L) pass.template operator()<1, false>();
  if (c < d) pass.template operator()<1, true>();
}

template <class I> inline bool in_range(const I* indices, int64_t n, int64_t d_sae) {
  using U = std::make_unsigned_t<I>;  // there negative ones are the largest of all
  U worst = 0;
  for (int64_t i = 0; i < n; ++i) worst = std::max(worst, static_cast<U>(indices[i]));
  return n == 0 || worst < static_cast<uint64_t>(d_sae);
}

// done.operator()<B, Part>(row, prefix, c0, total, columns) for every row, prefix and block of columns; where Part, fewer
// columns than B vectors hold exist. Blocks of one row come in ascending order, each on one thread at a time.
// Returns whether all indices are rows of W; where not, what is done is unfinished, but nothing outside W was read.
template <class T, class F> bool decode_rows(const CodeArgs<T>& args, const F& done) {
  using A = Acc<T>;
  const int64_t d = args.d_out, grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, args.k * std::min(d, kSlice<A>)));
  const int64_t bytes = args.d_sae * d * static_cast<int64_t>(sizeof(T));
  const int64_t worth = bytes <= kLastCacheBytes ? kUses : kUsesFromMemory;
  constexpr int64_t kChecked = 16;  // rows whose indices are checked together, to be read again from the nearest cache
  std::atomic<bool> good{true};
  const auto each_row = [&](bool check, const auto& f) {
    parallel_for(0, args.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r0 = begin; r0 < end; r0 += kChecked) {
        const int64_t n = std::min(kChecked, end - r0);
        if (check && !in_range(args.indices + r0 * args.k, n * args.k, args.d_sae)) good = false;
        else for (int64_t r = r0; r < r0 + n; ++r) f(r);
      }
    });
    return good.load();
  };
  if (bytes <= kCachedBytes || args.rows * args.k < worth * args.d_sae)
    return each_row(true, [&](int64_t r) { decode_row(args, r, done); });
  Buffer<A> packed(args.d_sae * kSlice<A>);
  for (int64_t c0 = 0; c0 < d && good; c0 += kSlice<A>)
    with_vecs<A>(d - c0, [&]<int B>() {
      constexpr int64_t stride = B * kLanes<A>;
      const int64_t columns = std::min(stride, d - c0);
      pack_slice(args.W, args.d_sae, d, c0, columns, stride, packed.p);
      const A* slice = packed.p;
      each_row(c0 == 0, [&](int64_t r) {
        const Ahead<A> then = next_rows(args, r, slice);
        if (columns == stride) decode_columns<B, false>(args, r, slice, stride, then, c0, columns, done);
        else decode_columns<B, true>(args, r, slice, stride, then, c0, columns, done);
      });
    });
  return good;
}

}  // namespace SK_ISA
}  // namespace sae_kernels
