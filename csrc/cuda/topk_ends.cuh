// The end of rows whose best entries topk_rows.cuh has kept: exactly k keys of each, in order where they are written.
#pragma once

#include "cuda/topk_rows.cuh"

namespace sae_kernels {

// Hands the keys that are not 0 to put(j, key), j from 0 on, in their order; where they are fewer than k, then the
// lowest of the other latents from `first` to `end`, at the lowest score. Returns how many these are together.
template <int N, class Put>
__device__ __forceinline__ int put_keys(const RowArgs& a, const uint64_t (&key)[N], int first, int end, Put put) {
  const int lane = lane_now();
  const unsigned before = (1u << lane) - 1;
  int n = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const unsigned votes = __ballot_sync(kAllLanes, key[i] > 0);
    if (key[i] > 0) put(n + __popc(votes & before), key[i]);
    n += __popc(votes);
  }
  const uint32_t floor = a.activation == kNone ? kFloor<kNone> : kFloor<kRelu>;
  for (; n < a.k && first < end; first += kWarp) {
    unsigned there = 0;  // which of the 32 from `first` on
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const unsigned bit = key[i] > 0 ? unsigned(latent_in(key[i]) - first) : kWarp;
      there |= bit < kWarp ? 1u << bit : 0;
    }
    const unsigned inside = end - first < kWarp ? (1u << (end - first)) - 1 : ~0u;
    const unsigned votes = ~__reduce_or_sync(kAllLanes, there) & inside;
    const int at = n + __popc(votes & before);
    if ((votes >> lane & 1) && at < a.k) put(at, key_of(floor, first + lane, false));
    n = min(a.k, n + __popc(votes));
  }
  return n;
}

// A row's entries, which N times 32 places hold, as keys through put_keys.
template <int Keys, int N, bool Sorted, class Put>
__device__ __forceinline__ int put_row(const RowArgs& a, int row, const uint64_t* buffers, int count, int first,
                                       int end, Put put) {
  const int lane = lane_now();
  uint64_t key[N];
#pragma unroll
  for (int i = 0; i < N; ++i)
    key[i] = 8 * i + lane / 4 < count ? KeyOf(a)(buffers[place_in<Keys>(row, i * kWarp + lane)]) : 0;
  if constexpr (Sorted) sort_keys<1, N>(key);
  return put_keys(a, key, first, end, put);
}

// The k best keys of a row, 0 to 15, to put(j, key); returns how many there are in latents `first` to `end`, fewer than
// k only where these are fewer. Sorted: in order.
template <int Keys, bool Sorted, class Rows, class Put>
__device__ __forceinline__ int best_keys(const RowArgs& a, const Rows& rows, int row, uint64_t* buffers, int first,
                                         int end, Put put) {
  constexpr int kMost = Keys > 6 ? 8 : 4;  // times 32 keys
  const int column = lane_now() % 4;
  int count = __shfl_sync(kAllLanes, rows.count(row / 8), row % 8 * 4 + column);  // in a segment
  int most = __reduce_max_sync(kAllLanes, unsigned(count));
  if (row_sum(count) > a.k || most > 8 * kMost) {
    uint32_t bound;
    count = (cut_row<Keys>(a, rows, row, buffers, a.k, bound) + 3 - column) / 4;
    most = __reduce_max_sync(kAllLanes, unsigned(count));
  }
  if (most <= 8) return put_row<Keys, 1, Sorted>(a, row, buffers, count, first, end, put);
  if (most <= 16) return put_row<Keys, 2, Sorted>(a, row, buffers, count, first, end, put);
  if (kMost == 4 || most <= 32) return put_row<Keys, 4, Sorted>(a, row, buffers, count, first, end, put);
  return put_row<Keys, kMost, Sorted>(a, row, buffers, count, first, end, put);
}

// How many entries row 0 to 15 has.
template <class Rows> __device__ __forceinline__ int entries_of(const Rows& rows, int row) {
  return __shfl_sync(kAllLanes, row_sum(rows.count(row / 8)), row % 8 * 4);
}

// The end of one row: its k best keys, in order; or it is left.
template <int Keys, class Rows>
__device__ void finish_row(const RowArgs& a, const Rows& rows, int row, int64_t first_row, uint64_t* buffers) {
  if (first_row + row >= a.size()) return;
  const int64_t number = a.row_at(first_row + row), begin = number * a.k;
  if (a.guessed() > 0 && entries_of(rows, row) < a.k) {
    if (lane_now() == 0) a.left.at[atomicAdd(a.left.size, 1)] = static_cast<int32_t>(number);
    return;
  }
  best_keys<Keys, true>(a, rows, row, buffers, 0, a.d_sae, [&](int j, uint64_t key) {
    write_code(a.values, a.indices, a.dtype, begin + j, key, a.activation == kAbs);
  });
}

// The end of those of a warp's rows, after cut_rows to k, at most 32 N, that have just k keys: several at a time.
// Returns the others, a bit for each.
template <int Keys, int N, class Rows> __device__ __forceinline__ unsigned finish_whole_rows(
    const RowArgs& a, const Rows& rows, int64_t first_row, const uint64_t* buffers) {
  constexpr int kKeys = 4, kAtOnce = kKeys / N;
  const int lane = lane_now();
  const int64_t size = a.size();
  unsigned others = 0;
#pragma unroll 1
  for (int first = 0; first < kWarpRows; first += kAtOnce) {
    unsigned odd = 0;
    uint64_t key[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int row = first + i / N, at = i % N * kWarp + lane;
      key[i] = at < a.k ? KeyOf(a)(buffers[place_in<Keys>(row, at)]) : 0;
      if (entries_of(rows, row) != a.k || (at < a.k && key[i] == 0)) odd |= 1u << row;
    }
    odd = __reduce_or_sync(kAllLanes, odd);
    others |= odd;
    sort_keys<kAtOnce, N>(key);
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int row = first + i / N, at = i % N * kWarp + lane;
      if (at < a.k && first_row + row < size && !(odd >> row & 1))
        write_code(a.values, a.indices, a.dtype, a.row_at(first_row + row) * a.k + at, key[i], a.activation == kAbs);
    }
  }
  return others;
}

template <int Keys, bool General, class Rows>
__device__ void finish_rows(const RowArgs& a, Rows& rows, int64_t first_row, uint64_t* buffers) {
  unsigned left = (1u << kWarpRows) - 1;
  if constexpr (kTogether<Keys, General>) {
    cut_rows<Keys, General, false>(a, a.k, buffers, rows);
    if (a.k <= kWarp) left = finish_whole_rows<Keys, 1>(a, rows, first_row, buffers);
    else if (Keys <= 3 || a.k <= 2 * kWarp) left = finish_whole_rows<Keys, 2>(a, rows, first_row, buffers);
    else left = finish_whole_rows<Keys, 4>(a, rows, first_row, buffers);
  }
#pragma unroll 1
  for (; left; left &= left - 1) finish_row<Keys>(a, rows, __ffs(left) - 1, first_row, buffers);
}

}  // namespace sae_kernels
