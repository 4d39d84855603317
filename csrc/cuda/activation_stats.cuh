// Statistics per latent of a code, the bits of the CPU's: everything added is an integer and everything else a maximum
// under a total order, so it does not matter in which order atomics arrive.
//
// Counts, exact sums, maxima and last rows are gathered in a table in shared memory. A block holds the tables of some
// neighbouring latents and goes over some rows: the grid is rows x latents, and every block reads the indices of its
// rows, but the values of its own latents alone, which a warp queues up so that none of its threads has nothing to add.
// Bound by the three to five atomics in shared memory of an entry: what can rarely be a new maximum is looked up first.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/dynamic_shared.cuh"

namespace sae_kernels {

constexpr int kStatsThreads = 256, kTallyThreads = 1024;
constexpr int kQueue = 2 * kWarp;                   // entries that wait until they fill a warp, and those of one look
constexpr int kQueueBytes = kTallyThreads / kWarp * kQueue * int(sizeof(unsigned));
constexpr int kLimit = 1 << 22;                     // from here on a magnitude is rejected, as is NaN
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

// For mark_fired.
template <class T, class I> struct FiredArgs {
  const T* values;      // [rows, k]
  const I* indices;     // [rows, k]
  const bool* counted;  // [rows], or null: all rows count
  bool* marks;          // [d_sae]
  int64_t entries, packs, d_sae;  // packs: of kPack entries; those after them are taken one by one
  int k, latents;                 // latents: of one block's bits, a multiple of kWarp
};

// For the other kernels: entries one by one.
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

template <class A> __device__ __forceinline__ bool usable(A value) { return fabs(value) < A(kLimit); }  // not so NaN

// Whether an entry fires; `value` is set where its index is in range.
template <class T, class I>
__device__ __forceinline__ bool fires(const T* values, const I* indices, int64_t at, int64_t d_sae, Acc<T>& value) {
  if (indices[at] < 0 || indices[at] >= d_sae) return false;
  value = to_acc(values[at]);
  return value != 0 && usable(value);
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

// limb += part, or -=; whether it went round, so that the next one is to change by 1.
__device__ __forceinline__ bool add_part(unsigned* limb, unsigned part, bool negative) {
  const unsigned before = atomicAdd(limb, negative ? 0u - part : part);
  return negative ? before < part : before + part < part;
}

// limbs += size, or -=, modulo 2^128; every limb `stride` after the one before.
__device__ __forceinline__ void add_size(unsigned* limbs, int stride, double size, bool negative) {
  uint64_t low, high;
  to_units(size, low, high);
  const unsigned parts[kLimbs] = {unsigned(low), unsigned(low >> 32), unsigned(high), unsigned(high >> 32)};
  bool carry = false;
#pragma unroll
  for (int i = 0; i < kLimbs; ++i) {
    const unsigned part = parts[i] + carry;  // 0 passes the carry on
    if (part != 0) carry = add_part(limbs + i * stride, part, negative);
  }
}

// The 24 bits of a float mostly are whole units: they reach two limbs at most, and nothing is to be rounded.
__device__ __forceinline__ void add_size(unsigned* limbs, int stride, float size, bool negative) {
  const unsigned bits = __float_as_uint(size), mantissa = (bits & 0x7fffff) | 0x800000;
  const int shift = int(bits >> 23) - 150 + 64;
  if (shift < 0) return add_size(limbs, stride, double(size), negative);
  const uint64_t units = uint64_t(mantissa) << shift % 32;
  unsigned* limb = limbs + shift / 32 * stride;
  const unsigned upper = unsigned(units >> 32) + add_part(limb, unsigned(units), negative);
  if (upper == 0 || !add_part(limb += stride, upper, negative)) return;
  while ((limb += stride) < limbs + kLimbs * stride && add_part(limb, 1, negative)) {}
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

// A maximum that is seldom new: looking costs less than an atomic, and who sees an older one makes an atomic in vain.
template <class N> __device__ __forceinline__ void raise_shared(N* at, N to) {
  if (to > look(at)) atomicMax(at, to);
}

// An entry of the block's own latents; last: one more than the highest place at which one fired.
template <class T>
__device__ __forceinline__ void tally(const StatsTable<T>& table, T stored, int slot, unsigned place,
                                      int64_t* rejected) {
  using Square = std::conditional_t<sizeof(T) == 2, float, double>;  // in which the square is exact
  const Acc<T> value = to_acc(stored);
  if (value == 0) return;
  if (!usable(value)) return add(rejected, 1);
  atomicAdd(table.counts + slot, 1u);
  raise_shared(table.last + slot, place + 1);
  raise_shared(table.maximum + slot, rank_of(value));
  add_size(table.sums + slot, table.latents, Acc<T>(fabs(value)), value < 0);
  add_size(table.squares + slot, table.latents, Square(value) * value, false);
}

template <class T, class I>
__device__ __forceinline__ void fold(const StatsArgs<T, I>& a, const StatsTable<T>& table, int slot, int64_t latent,
                                     int64_t begin) {
  if (table.counts[slot] == 0) return;
  add(a.counts + latent, table.counts[slot]);
  raise(a.maximum + latent, ranked(table.maximum[slot]));
  const int64_t row = (begin + table.last[slot] - 1) / a.k, number = a.numbers ? a.numbers[row] : a.row + row;
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

// Grid: shares of entries x tables of latents. The last entries come first: few of the others are the last row then.
template <class T, class I> __global__ void __launch_bounds__(kTallyThreads, 1) add_entries(StatsArgs<T, I> a) {
  using Place = std::make_unsigned_t<I>;
  const StatsTable<T> table(dynamic_shared(), a.latents);
  const int threads = blockDim.x, lane = threadIdx.x % kWarp;
  const bool alone = gridDim.y == 1;
  const int64_t begin = blockIdx.x * a.share, first_latent = int64_t(blockIdx.y) * a.latents;
  const int entries = int(min(a.share, a.entries - begin));
  const auto latents = static_cast<Place>(min(int64_t(a.latents), a.d_sae - first_latent));
  unsigned* words = reinterpret_cast<unsigned*>(table.maximum);
  const int table_words = a.latents * StatsTable<T>::kBytes / 4;
  for (int i = threadIdx.x; i < table_words; i += threads) words[i] = 0;
  unsigned* queue = words + table_words + threadIdx.x / kWarp * kQueue;  // places, of a warp
  __syncthreads();
  const auto tally_at = [&](unsigned place) {
    const int64_t latent = a.indices[begin + place];
    tally(table, a.values[begin + place], int(latent - first_latent), place, a.rejected + latent);
  };
  int queued = 0;
  int place = (entries - 1) / threads * threads + int(threadIdx.x);
  I next = place < entries ? a.indices[begin + place] : I(0);
  T next_value = place < entries ? a.values[begin + place] : T();
  for (; place >= 0; place -= threads) {
    const I latent = next;
    const T value = next_value;
    if (place >= threads) {
      next = a.indices[begin + place - threads];
      next_value = a.values[begin + place - threads];
    }
    const Place slot = Place(latent) - Place(first_latent);  // wraps round where the latent is below
    const bool here = place < entries, mine = here && slot < latents;
    if (here && !mine && first_latent == 0 && (latent < 0 || latent >= a.d_sae)) add(a.foreign, 1);
    if (alone) {
      if (mine) tally(table, value, int(slot), unsigned(place), a.rejected + latent);
      continue;
    }
    const unsigned votes = __ballot_sync(kAllLanes, mine);
    if (mine) queue[queued + __popc(votes & ((1u << lane) - 1))] = unsigned(place);
    queued += __popc(votes);
    __syncwarp();
    if (queued < kWarp) continue;
    queued -= kWarp;
    tally_at(queue[queued + lane]);
    __syncwarp();
  }
  if (lane < queued) tally_at(queue[lane]);
  __syncthreads();
  for (int slot = threadIdx.x; slot < int(latents); slot += threads) fold(a, table, slot, first_latent + slot, begin);
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
  if (at >= a.entries || !fires(a.values, a.indices, at, a.d_sae, value)) return;
  const int64_t number = (__double_as_longlong(fabs(double(value))) >> a.shift) - a.first;
  add(a.table + int64_t(a.indices[at]) * a.columns + max(int64_t(0), min(number, a.columns - 1)), 1);
}

// table [columns, columns]: every ordered pair of a row's firings; a block per row.
template <class T, class I> __global__ void __launch_bounds__(kStatsThreads) count_pairs(EntryArgs<T, I> a) {
  const int64_t begin = int64_t(blockIdx.x) * a.k;
  const auto place = [&](int j) {
    Acc<T> value = 0;
    if (!fires(a.values, a.indices, begin + j, a.d_sae, value)) return int64_t(-1);
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
  const bool counts = fires(a.values, a.indices, at, a.d_sae, value);
  const int64_t latent = counts ? int64_t(a.indices[at]) : 0;
  const bool reaches = counts && value >= a.top_values[latent * a.n + a.n - 1];
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

constexpr int kPack = 8;  // kWide of the narrowest type

// kPack neighbours, 16 bytes at a time.
template <class T> __device__ __forceinline__ void load_wide(const T* from, T (&to)[kPack]) {
#pragma unroll
  for (int i = 0; i < kPack; i += kWide<T>) {
    const auto pack = load_pack<kWide<T>>(from + i);
#pragma unroll
    for (int j = 0; j < kWide<T>; ++j) to[i + j] = pack.at[j];
  }
}

// Marks the latents of values other than 0; grid: blocks that stride over the entries x ranges of latents.
//
// A block keeps a bit per latent in shared memory. An entry that finds it set writes nothing, nor is its row looked at,
// and values are read only where a bit of their pack is missing: of many entries of few latents, the indices alone.
template <class T, class I> __global__ void __launch_bounds__(kTallyThreads, 1) mark_fired(FiredArgs<T, I> a) {
  using Place = std::make_unsigned_t<I>;
  unsigned* bits = reinterpret_cast<unsigned*>(dynamic_shared());
  const int64_t first_latent = int64_t(blockIdx.y) * a.latents;
  const auto latents = static_cast<Place>(min(int64_t(a.latents), a.d_sae - first_latent));
  const int64_t threads = int64_t(gridDim.x) * blockDim.x, thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int i = threadIdx.x; i < a.latents / kWarp; i += blockDim.x) bits[i] = 0;
  __syncthreads();
  const auto slot_of = [&](I latent) { return Place(latent) - Place(first_latent); };  // wraps round where it is below
  const auto unmarked = [&](I latent) {  // an older state costs an atomic in vain, no more
    const Place slot = slot_of(latent);
    return slot < latents && !(look(bits + slot / kWarp) >> slot % kWarp & 1);
  };
  const auto mark = [&](I latent, T value, int64_t at) {
    if (to_acc(value) == 0 || (a.counted && !a.counted[at / a.k])) return;
    atomicOr(bits + slot_of(latent) / kWarp, 1u << slot_of(latent) % kWarp);
  };
  for (int64_t pack = thread; pack < a.packs; pack += threads) {
    I latent[kPack];
    T value[kPack];
    load_wide(a.indices + pack * kPack, latent);
    unsigned wanted = 0;
#pragma unroll
    for (int i = 0; i < kPack; ++i) wanted |= unsigned(unmarked(latent[i])) << i;
    if (wanted == 0) continue;
    load_wide(a.values + pack * kPack, value);
#pragma unroll
    for (int i = 0; i < kPack; ++i)
      if (wanted >> i & 1) mark(latent[i], value[i], pack * kPack + i);
  }
  for (int64_t at = a.packs * kPack + thread; at < a.entries; at += threads)
    if (unmarked(a.indices[at])) mark(a.indices[at], a.values[at], at);
  __syncthreads();
  for (int bit = threadIdx.x; bit < int(latents); bit += blockDim.x)
    if (bits[bit / kWarp] >> bit % kWarp & 1) a.marks[first_latent + bit] = true;
}

}  // namespace sae_kernels
