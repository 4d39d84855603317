// The end of rows whose best entries topk_rows.cuh has kept: exactly k keys of each, in order where they are written.
#pragma once

#include "cuda/topk_rows.cuh"

namespace sae_kernels {

struct WarpTeam { static constexpr int kTeam = kWarp; };

// Where fewer latents than k passed: the lowest of the others fill up, at the lowest score, as far as `first` to `end`
// has any, in order. buffer: n keys; returns how many they are then.
__device__ __forceinline__ int fill_up(const RowArgs& a, uint64_t* buffer, int n, int first, int end) {
  const int lane = threadIdx.x % kWarp, taken = n;
  const uint32_t floor = a.activation == kNone ? kFloor<kNone> : kFloor<kRelu>;
  for (; n < a.k && first < end; first += kWarp) {
    unsigned there = 0;  // which of the 32 from `first` on
    for (int begin = 0; begin < taken; begin += kWarp) {
      const int bit = begin + lane < taken ? latent_in(buffer[begin + lane]) - first : -1;
      there |= __reduce_or_sync(kAllLanes, bit >= 0 && bit < kWarp ? 1u << bit : 0);
    }
    const unsigned votes = ~there & (end - first < kWarp ? (1u << (end - first)) - 1 : ~0u);
    const int at = n + __popc(votes & ((1u << lane) - 1));
    if ((votes >> lane & 1) && at < a.k) buffer[at] = key_of(floor, first + lane, false);
    n = min(a.k, n + __popc(votes));
  }
  __syncwarp();
  return n;
}

// The k best keys of a row at the beginning of its buffer; returns how many there are in latents `first` to `end`,
// fewer than k only where these are fewer. Sorted: in order.
template <int Keys, bool Sorted>
__device__ __forceinline__ int best_keys(const RowArgs& a, const RowState& rows, int quad, int half, uint64_t* buffer,
                                         int first, int end) {
  const int lane = threadIdx.x % kWarp;
  const KeyOf read(a);
  uint32_t bound;
  const int n = cut_row<Keys>(rows, quad, half, buffer, a.k, a.k, read, [](int j) { return j; }, bound);
  for (int at = lane; at < n; at += kWarp) buffer[at] = read(buffer[at]);
  __syncwarp();
  if (Sorted && n <= kWarp) {
    uint64_t key[1] = {lane < n ? buffer[lane] : 0};
    sort_warp(key);
    if (lane < n) buffer[lane] = key[0];
    __syncwarp();
  } else if (Sorted) {
    sort_descending<WarpTeam>(buffer, n, n, lane);
  }
  return fill_up(a, buffer, n, first, end);
}

// How many of its rows' entries a warp has where exactly k are to be left; of `row`, 0 to 15.
template <int Keys> __device__ __forceinline__ int entries_of(const RowState& rows, int row) {
  const int mine = ((row / 8 ? rows.next[1] : rows.next[0]) - rows.begin) / int(sizeof(uint64_t));
  return __shfl_sync(kAllLanes, row_sum(mine), row % 8 * 4);
}
// Entry j of a row, after cut_rows.
template <int Keys> __device__ __forceinline__ uint64_t entry_at(const uint64_t* row, int j) {
  return row[j % 4 * kSegment<Keys> + j / 4];
}

// The end of one row: its k best keys, in order.
template <int Keys> __device__ void finish_row(const RowArgs& a, const RowState& rows, int number, int64_t first_row,
                                               uint64_t* buffers) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = first_row + number;
  uint64_t* buffer = buffers + number * kRowKeys<Keys>;
  if (row >= a.rows) return;
  best_keys<Keys, true>(a, rows, number % 8, number / 8, buffer, 0, a.d_sae);
  for (int j = lane; j < a.k; j += kWarp)
    write_code(a.values, a.indices, a.dtype, row * a.k + j, buffer[j], a.activation == kAbs);
}

// The end of all of a warp's rows: several at a time where each has its k entries, at most one per lane.
template <int Keys, bool General>
__device__ void finish_rows(const RowArgs& a, RowState& rows, int64_t first_row, uint64_t* buffers) {
  constexpr int kAtOnce = 4;
  const int lane = threadIdx.x % kWarp;
  if constexpr (kTogether<Keys, General>) cut_rows<Keys, General, false>(a, a.k, buffers, rows);
#pragma unroll 1
  for (int first = 0; first < kWarpRows; first += kAtOnce) {
    bool plain = kTogether<Keys, General> && a.k <= kWarp;
    uint64_t key[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      key[i] = lane < a.k ? KeyOf(a)(entry_at<Keys>(buffers + (first + i) * kRowKeys<Keys>, lane)) : 0;
      const bool whole = entries_of<Keys>(rows, first + i) == a.k && (lane >= a.k || key[i] > 0);
      plain &= whole || first_row + first + i >= a.rows;
    }
    if (!__all_sync(kAllLanes, plain)) {
#pragma unroll 1
      for (int i = 0; i < kAtOnce; ++i) finish_row<Keys>(a, rows, first + i, first_row, buffers);
      continue;
    }
    sort_warp(key);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t row = first_row + first + i;
      if (lane < a.k && row < a.rows)
        write_code(a.values, a.indices, a.dtype, row * a.k + lane, key[i], a.activation == kAbs);
    }
  }
}

}  // namespace sae_kernels
