// Statistics per latent of a code, the bits of the CPU's: everything added is an integer and everything else a maximum
// under a total order, so it does not matter in which order atomics arrive.
//
// Counts, exact sums, maxima and last rows are gathered in a table in shared memory. A block holds the tables of some
// neighbouring latents and goes over some rows: the grid is rows x latents, and every block reads the indices of its
// rows, but the values of its own latents alone. Bound by about six atomics in shared memory per entry.
#pragma once

#include "cuda/device.cuh"
#include "cuda/dynamic_shared.cuh"

namespace sae_kernels {

constexpr int kStatsThreads = 256, kTallyThreads = 1024;
constexpr int kLimbs = 4;                           // of 32 bits: units of 2^-64, 2^-32, 1, 2^32
constexpr int64_t kLargestShare = int64_t(1) << 20;  // entries of a block: their squares fit 128 bits

template <class T, class I> struct StatsArgs {
  const T* values;         // [rows, k]
  const I* indices;        // [rows, k]
  const int64_t* numbers;  // [rows] of the rows, ascending; or null: they count up from `row`
  int64_t *counts, *last, *rejected;  // [d_sae]
  int64_t* sums;           // [d_sae, 2, kLimbs]: of the values, of their squares
  double* maximum;         // [d_sae]
  int64_t* foreign;        // [1]: entries without a latent
  int64_t entries, share, row, d_sae;
  int k, latents;          // latents: of one block's table
};

// For the other three kernels: entries one by one.
template <class T, class I> struct EntryArgs {
  const T* values;          // [rows, k]
  const I* indices;         // [rows, k]
  const int64_t* ids;       // [rows]
  const int64_t* position;  // [d_sae]: place in the table or -1; null: the latent itself
  const int64_t *order, *starts;  // candidates sorted by latent; [d_sae + 1] where each latent's begin
  int64_t* table;           // bins [d_sae, columns], or pairs [columns, columns]
  double* top_values;       // [d_sae, n], descending
  int64_t* top_ids;         // [d_sae, n], ascending among equal values
  int32_t* keys;            // [rows, k]
  int64_t entries, d_sae, columns, first;
  int k, n, shift;
};

enum class Entry { kNothing, kFires, kRejected, kForeign };

// What an entry does; `value` is set where it fires.
template <class T, class I>
__device__ __forceinline__ Entry entry_of(const T* values, const I* indices, int64_t at, int64_t d_sae, Acc<T>& value) {
  if (indices[at] < 0 || indices[at] >= d_sae) return Entry::kForeign;
  value = to_acc(values[at]);
  if (value == 0) return Entry::kNothing;
  return fabs(value) < Acc<T>(4194304) ? Entry::kFires : Entry::kRejected;  // 2^22; NaN is rejected
}

// Unsigned integers that rise with x, for x other than NaN; none of them is 0.
constexpr unsigned long long kHighest = 1ull << 63;
__device__ __forceinline__ unsigned rank_of(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ __forceinline__ unsigned long long rank_of(double x) {
  const unsigned long long bits = __double_as_longlong(x);
  return bits >> 63 ? ~bits : bits | kHighest;
}
__device__ __forceinline__ double ranked(unsigned rank) {
  return __uint_as_float(rank >> 31 ? rank & ~(1u << 31) : ~rank);
}
__device__ __forceinline__ double ranked(unsigned long long rank) {
  return __longlong_as_double(rank >> 63 ? rank & ~kHighest : ~rank);
}
__device__ __forceinline__ void raise(double* at, double x) {
  const long long bits = __double_as_longlong(x);
  if (bits >= 0) atomicMax(reinterpret_cast<long long*>(at), bits);
  else atomicMin(reinterpret_cast<unsigned long long*>(at), 0ull + bits);  // among negatives the order turns round
}
__device__ __forceinline__ void add(int64_t* at, int64_t x) {
  atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(x));
}

// size of [0, 2^44), rounded once to a multiple of 2^-64, ties to even: low and high 64 bits of that integer.
__device__ __forceinline__ void to_units(double size, uint64_t& low, uint64_t& high) {
  const uint64_t bits = __double_as_longlong(size), exponent = bits >> 52;
  const uint64_t mantissa = (bits & ((uint64_t(1) << 52) - 1)) | (exponent ? uint64_t(1) << 52 : 0);
  const int shift = int(exponent ? exponent : 1) - 1075 + 64;  // up to 43 + 12
  low = high = 0;
  if (shift >= 0) {
    low = mantissa << shift;
    high = shift > 0 ? mantissa >> (64 - shift) : 0;
  } else if (shift > -63) {
    const uint64_t whole = mantissa >> -shift, rest = mantissa & ((uint64_t(1) << -shift) - 1);
    const uint64_t half = uint64_t(1) << (-shift - 1);
    low = whole + (rest > half || (rest == half && (whole & 1)));
  }
}

// limbs += size, or -=, modulo 2^128; every limb `stride` after the one before. Carries go up one by one: each atomic
// knows whether it went round.
__device__ __forceinline__ void add_units(unsigned* limbs, int stride, double size, bool negative) {
  uint64_t low, high;
  to_units(size, low, high);
  const unsigned parts[kLimbs] = {unsigned(low), unsigned(low >> 32), unsigned(high), unsigned(high >> 32)};
#pragma unroll
  for (int i = 0; i < kLimbs; ++i) {
    if (parts[i] == 0) continue;
    unsigned before = atomicAdd(limbs + i * stride, negative ? 0u - parts[i] : parts[i]);
    bool round = negative ? before < parts[i] : before + parts[i] < parts[i];
    for (int above = i + 1; round && above < kLimbs; ++above) {
      before = atomicAdd(limbs + above * stride, negative ? ~0u : 1u);
      round = before == (negative ? 0u : ~0u);
    }
  }
}

// The table of a block, an array of `latents` per field: latents of one warp then lie in different banks.
template <class T> struct StatsTable {
  using Rank = decltype(rank_of(Acc<T>()));
  Rank* maximum;
  unsigned *counts, *last, *sums, *squares;
  int latents;
  static constexpr int kBytes = sizeof(Rank) + 4 * (2 + 2 * kLimbs);  // of a latent
  __device__ StatsTable(unsigned char* pool, int latents) : latents(latents) {
    maximum = reinterpret_cast<Rank*>(pool);
    counts = reinterpret_cast<unsigned*>(maximum + latents);
    last = counts + latents;
    sums = last + latents;
    squares = sums + kLimbs * latents;
  }
};

// last: one more than the highest row in which it fired, counted from the block's first row.
template <class T, class I>
__device__ __forceinline__ void tally(const StatsArgs<T, I>& a, const StatsTable<T>& table, int64_t at,
                                      int64_t first_row, int64_t first_latent) {
  Acc<T> value = 0;
  const Entry entry = entry_of(a.values, a.indices, at, a.d_sae, value);
  if (entry == Entry::kForeign && first_latent == 0) add(a.foreign, 1);
  if (entry == Entry::kForeign || entry == Entry::kNothing) return;
  const int64_t slot = int64_t(a.indices[at]) - first_latent;
  if (entry == Entry::kRejected) {
    add(a.rejected + slot + first_latent, 1);
    return;
  }
  atomicAdd(table.counts + slot, 1u);
  atomicMax(table.last + slot, unsigned(at - first_row * a.k) / unsigned(a.k) + 1);
  atomicMax(table.maximum + slot, rank_of(value));
  add_units(table.sums + slot, table.latents, fabs(value), value < 0);
  add_units(table.squares + slot, table.latents, double(value) * value, false);
}

template <class T, class I>
__device__ __forceinline__ void fold(const StatsArgs<T, I>& a, const StatsTable<T>& table, int slot, int64_t latent,
                                     int64_t first_row) {
  if (table.counts[slot] == 0) return;
  add(a.counts + latent, table.counts[slot]);
  raise(a.maximum + latent, ranked(table.maximum[slot]));
  const int64_t at = first_row + table.last[slot] - 1, number = a.numbers ? a.numbers[at] : a.row + at;
  atomicMax(reinterpret_cast<long long*>(a.last + latent), static_cast<long long>(number));
  int64_t* sums = a.sums + latent * 2 * kLimbs;
#pragma unroll
  for (int i = 0; i < kLimbs; ++i) {
    const unsigned limb = table.sums[i * table.latents + slot], square = table.squares[i * table.latents + slot];
    const int64_t sum = i == kLimbs - 1 ? int64_t(int(limb)) : int64_t(limb);  // the highest one has the sign
    if (sum != 0) add(sums + i, sum);
    if (square != 0) add(sums + kLimbs + i, square);
  }
}

// Grid: shares of entries x tables of latents.
template <class T, class I> __global__ void __launch_bounds__(kTallyThreads) add_entries(StatsArgs<T, I> a) {
  constexpr int kAhead = 8;  // indices in flight
  const StatsTable<T> table(dynamic_shared(), a.latents);
  const int threads = blockDim.x;
  const int64_t begin = blockIdx.x * a.share, end = min(begin + a.share, a.entries), first_row = begin / a.k;
  const int64_t first_latent = int64_t(blockIdx.y) * a.latents;
  unsigned* words = reinterpret_cast<unsigned*>(table.maximum);
  for (int i = threadIdx.x; i < a.latents * StatsTable<T>::kBytes / 4; i += threads) words[i] = 0;
  __syncthreads();
  for (int64_t start = begin + threadIdx.x; start < end; start += int64_t(kAhead) * threads) {
    I latent[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t at = start + int64_t(u) * threads;
      latent[u] = at < end ? a.indices[at] : I(-1);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t at = start + int64_t(u) * threads;
      const bool known = latent[u] >= 0 && latent[u] < a.d_sae;
      const bool mine = known ? uint64_t(latent[u] - first_latent) < uint64_t(a.latents) : first_latent == 0;
      if (at < end && mine) tally(a, table, at, first_row, first_latent);
    }
  }
  __syncthreads();
  for (int slot = threadIdx.x; slot < a.latents && first_latent + slot < a.d_sae; slot += threads)
    fold(a, table, slot, first_latent + slot, first_row);
}

// Three limbs of each sum brought back to [0, 2^32); what is over goes to the next.
template <class T, class I> __global__ void __launch_bounds__(kStatsThreads) carry_limbs(StatsArgs<T, I> a) {
  const int64_t cell = int64_t(blockIdx.x) * kStatsThreads + threadIdx.x;
  if (cell >= 2 * a.d_sae) return;
  int64_t* limbs = a.sums + cell * kLimbs;
  int64_t carried = 0;
  for (int i = 0; i < kLimbs - 1; ++i) {
    carried += limbs[i];
    limbs[i] = carried & 0xffffffff;
    carried >>= 32;
  }
  limbs[kLimbs - 1] += carried;
}

// table [d_sae, columns]: exponent and leading mantissa bits of |value| number its bin.
template <class T, class I> __global__ void __launch_bounds__(kStatsThreads) count_bins(EntryArgs<T, I> a) {
  const int64_t at = int64_t(blockIdx.x) * kStatsThreads + threadIdx.x;
  Acc<T> value = 0;
  if (at >= a.entries || entry_of(a.values, a.indices, at, a.d_sae, value) != Entry::kFires) return;
  const int64_t number = (__double_as_longlong(fabs(double(value))) >> a.shift) - a.first;
  add(a.table + int64_t(a.indices[at]) * a.columns + max(int64_t(0), min(number, a.columns - 1)), 1);
}

// table [columns, columns]: every ordered pair of a row's firings; a block per row.
template <class T, class I> __global__ void __launch_bounds__(kStatsThreads) count_pairs(EntryArgs<T, I> a) {
  const int64_t begin = int64_t(blockIdx.x) * a.k;
  const auto place = [&](int j) {
    Acc<T> value = 0;
    if (entry_of(a.values, a.indices, begin + j, a.d_sae, value) != Entry::kFires) return int64_t(-1);
    return a.position ? a.position[a.indices[begin + j]] : int64_t(a.indices[begin + j]);
  };
  for (int64_t pair = threadIdx.x; pair < int64_t(a.k) * a.k; pair += kStatsThreads) {
    const int64_t one = place(pair / a.k), other = place(pair % a.k);
    if (one >= 0 && other >= 0) add(a.table + one * a.columns + other, 1);
  }
}

// keys [rows, k]: the latent of an entry that reaches the last of that latent's kept values, else d_sae.
template <class T, class I> __global__ void __launch_bounds__(kStatsThreads) mark_candidates(EntryArgs<T, I> a) {
  const int64_t at = int64_t(blockIdx.x) * kStatsThreads + threadIdx.x;
  if (at >= a.entries) return;
  Acc<T> value = 0;
  const bool fires = entry_of(a.values, a.indices, at, a.d_sae, value) == Entry::kFires;
  const int64_t latent = fires ? int64_t(a.indices[at]) : 0;
  const bool reaches = fires && value >= a.top_values[latent * a.n + a.n - 1];
  a.keys[at] = static_cast<int32_t>(reaches ? latent : a.d_sae);
}

// A warp per latent puts its candidates, one by one, in their places among the kept ones.
template <class T, class I> __global__ void __launch_bounds__(kStatsThreads) merge_candidates(EntryArgs<T, I> a) {
  const int64_t latent = (int64_t(blockIdx.x) * kStatsThreads + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (latent >= a.d_sae) return;
  double* kept = a.top_values + latent * a.n;
  int64_t* ids = a.top_ids + latent * a.n;
  for (int64_t i = a.starts[latent]; i < a.starts[latent + 1]; ++i) {
    const double value = to_acc(a.values[a.order[i]]);
    const int64_t id = a.ids[a.order[i] / a.k];
    int before = 0;
    for (int p = lane; p < a.n; p += kWarp) before += kept[p] > value || (kept[p] == value && ids[p] <= id);
    const int place = __reduce_add_sync(kAllLanes, before);
    // from the last ones on, a warp's width at a time, everything moves one place
    for (int high = a.n; high > place; high -= kWarp) {
      const int p = high - 1 - lane;
      const bool moves = p > place;
      const double moved = moves ? kept[p - 1] : value;
      const int64_t moved_id = moves ? ids[p - 1] : id;
      __syncwarp();
      if (p >= place) kept[p] = moved, ids[p] = moved_id;
      __syncwarp();
    }
  }
}

}  // namespace sae_kernels
