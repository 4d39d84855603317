// Rows of codes decoded: k rows of W gathered and summed in registers per row of output.
//
// Where W is larger than a cache and its rows are used often enough, it is read in slices of columns, each copied to where it
// lies densely in the cache, as latent_sums.h does with the rows.
#pragma once

#include "cpu/latent_sums.h"

namespace sae_kernels {

// values, indices [rows, k]; W [d_sae, d_out]; bias [d_out] or null. Slots up to prefixes[p] make prefix p; the last is k.
template <class T> struct CodeArgs {
  const T* values; const int32_t* indices; const T* W; const T* bias;
  int64_t rows, k, d_out, d_sae;
  const int64_t* prefixes; int64_t n_prefixes;
};

namespace SK_ISA {

// Slices are worth their copy where a row of W is used very often, or else comes from memory each time.
constexpr int64_t kCachedBytes = 3 << 19, kUses = 128, kLastCacheBytes = 32 << 20, kUsesFromMemory = 8;

// total[b] += sum of value * row of slots [j, end); `columns` of B vectors exist; rows ahead are fetched up to `ahead_end`.
template <int B, bool Part, class T, class R>
inline void add_rows(const T* values, const int32_t* indices, int64_t j, int64_t end, int64_t ahead_end, const R* W, int64_t stride,
                     int64_t columns, Vec<Acc<T>> (&total)[B]) {
  constexpr int64_t L = kLanes<Acc<T>>, kAhead = 8;
  for (; j < end; ++j) {
    const Vec<Acc<T>> value = splat(to_acc(values[j]));
    const R* w = W + indices[j] * stride;
    if (j + kAhead < ahead_end) prefetch_row(W + indices[j + kAhead] * stride, columns);
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b) total[b] += value * (Part ? load_some(w + b * L, columns - b * L) : load(w + b * L));
  }
}

// Columns [c0, c0 + columns) of one row; W begins at column c0. done(prefix, c0, total, columns) after each prefix.
template <int B, bool Part, class T, class R, class F>
inline void decode_columns(const CodeArgs<T>& args, int64_t row, const R* W, int64_t stride, int64_t c0, int64_t columns,
                           bool whole_row, const F& done) {
  constexpr int64_t L = kLanes<Acc<T>>;
  const T* values = args.values + row * args.k;
  const int32_t* indices = args.indices + row * args.k;
  // where one pass does the whole row, what comes ahead is in the next rows too
  const int64_t ahead_end = whole_row ? (args.rows - row) * args.k : args.k;
  Vec<Acc<T>> total[B] = {};
  if (args.bias)
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b) total[b] = Part ? load_some(args.bias + c0 + b * L, columns - b * L) : load(args.bias + c0 + b * L);
  int64_t j = 0;
  for (int64_t p = 0; p < args.n_prefixes; j = args.prefixes[p++]) {
    add_rows<B, Part>(values, indices, j, args.prefixes[p], ahead_end, W, stride, columns, total);
    done.template operator()<B, Part>(row, p, c0, total, columns);
  }
}

template <class T, class F> inline void decode_row(const CodeArgs<T>& args, int64_t row, const F& done) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<A>, Wide = kVecBytes == 64 ? 16 : 8;
  const int64_t d = args.d_out;
  int64_t c = 0;
  const auto pass = [&]<int B, bool Part>() {
    const int64_t columns = std::min(B * L, d - c);
    decode_columns<B, Part>(args, row, args.W + c, d, c, columns, columns == d, done);
    c += columns;
  };
  while (d - c >= Wide * L) pass.template operator()<Wide, false>();
  while (d - c >= 4 * L) pass.template operator()<4, false>();
  while (d - c >= L) pass.template operator()<1, false>();
  if (c < d) pass.template operator()<1, true>();
}

// done.operator()<B, Part>(row, prefix, c0, total, columns) for every row, prefix and block of columns; where Part, fewer
// columns than B vectors hold exist. Blocks of one row come in ascending order, each on one thread at a time.
template <class T, class F> void decode_rows(const CodeArgs<T>& args, const F& done) {
  using A = Acc<T>;
  const int64_t d = args.d_out, grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, args.k * std::min(d, kSlice<A>)));
  const int64_t bytes = args.d_sae * d * static_cast<int64_t>(sizeof(T));
  const int64_t worth = bytes <= kLastCacheBytes ? kUses : kUsesFromMemory;
  if (bytes <= kCachedBytes || args.rows * args.k < worth * args.d_sae) {
    parallel_for(0, args.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) decode_row(args, r, done);
    });
    return;
  }
  Buffer<A> packed(args.d_sae * kSlice<A>);
  for (int64_t c0 = 0; c0 < d; c0 += kSlice<A>)
    with_vecs<A>(d - c0, [&]<int B>() {
      constexpr int64_t stride = B * kLanes<A>;
      const int64_t columns = std::min(stride, d - c0);
      pack_slice(args.W, args.d_sae, d, c0, columns, stride, packed.p);
      parallel_for(0, args.rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          if (columns == stride) decode_columns<B, false>(args, r, packed.p, stride, c0, columns, true, done);
          else decode_columns<B, true>(args, r, packed.p, stride, c0, columns, true, done);
        }
      });
    });
}

}  // namespace SK_ISA
}  // namespace sae_kernels
