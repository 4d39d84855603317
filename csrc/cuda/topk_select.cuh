// The k best of every row of a slab of pre-activations, exact: larger score first, NaN above all, equal scores by the
// lower latent. One team of threads per row, a warp or a block. A first pass takes maxima of strided groups: the k-th
// largest of them has k scores at or above it, so what lies below is out. A second pass appends what is left to a
// buffer in shared memory. Where that fills up (ties, unlucky orders) it is trimmed early, its k best and a few more
// stay, and the bound rises to the lowest of them: columns come in ascending order, so every input gives the exact
// result. What the last chunk leaves is sorted. Reads the slab twice, from L2 where it fits there; chunks of latents after the first are read once.
#pragma once

#include "cuda/topk_keys.cuh"

namespace sae_kernels {

struct SelectArgs {
  const float* slab;    // [rows, columns], `stride` elements from row to row: latents first, first + 1, ...
  const float* bias;    // of all latents, or null
  const uint8_t* mask;  // of all latents, or null: 0 does not compete
  // Where Limited. A score at or below its threshold, or out of the mask, becomes the lowest there is:
  // such latents fill up, the lowest first.
  const float* threshold;  // of all latents, or with threshold_step 0 one for all
  int32_t* passed;         // [rows] adds up how many are above their threshold
  uint64_t* keys;       // [rows, k] the best so far; read where `filled`, written unless `last`
  void* values;         // [rows, k]
  int32_t* indices;     // [rows, k]
  int32_t* trims;       // counts the rows whose buffer was trimmed early
  int64_t rows, stride;
  int columns, first, k, filled, last, threshold_step;
  Out dtype;
};

// V pre-activations from `column` on, of the first ones beyond the last column: no branch keeps several of these loads
// from being in flight at once. Where V > 1 it divides the columns.
template <int V> __device__ __forceinline__ Pack<float, V> read_slab(const SelectArgs& a, const float* row, int column) {
  return load_pack<V>(row + (column < a.columns ? column : 0));
}
// Their orders, 0 beyond the last column; pre becomes complete.
template <int V, int Act, bool Limited>
__device__ __forceinline__ void to_orders(const SelectArgs& a, int column, Pack<float, V>& read, uint32_t (&order)[V]) {
  const bool inside = column < a.columns;
  const int latent = a.first + (inside ? column : 0);
  float(&pre)[V] = read.at;
  if (a.bias) {
    const Pack<float, V> bias = load_pack<V>(a.bias + latent);
#pragma unroll
    for (int i = 0; i < V; ++i) pre[i] += bias.at[i];
  }
#pragma unroll
  for (int i = 0; i < V; ++i) order[i] = order_of<Act>(pre[i]);
  if constexpr (Limited) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const bool fails = (Act == kAbs ? fabsf(pre[i]) : pre[i]) <= a.threshold[int64_t(latent + i) * a.threshold_step];
      order[i] = fails ? kFloor<Act> : order[i];
    }
  }
  if (a.mask) {
    const Pack<uint8_t, V> mask = load_pack<V>(a.mask + latent);
#pragma unroll
    for (int i = 0; i < V; ++i) order[i] = mask.at[i] ? order[i] : Limited ? kFloor<Act> : kMasked;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) order[i] = inside ? order[i] : 0;
}

// Calls use(first column, the thread's kReads packs) over a row; the next packs are on their way meanwhile.
template <int Team, int V, int kReads, class F>
__device__ __forceinline__ void over_columns(const SelectArgs& a, const float* row, int lane, F&& use) {
  constexpr int kSpan = Team * V * kReads;
  Pack<float, V> next[kReads];
#pragma unroll
  for (int r = 0; r < kReads; ++r) next[r] = read_slab<V>(a, row, (r * Team + lane) * V);
  for (int start = 0; start < a.columns; start += kSpan) {
    Pack<float, V> now[kReads];
#pragma unroll
    for (int r = 0; r < kReads; ++r) {
      now[r] = next[r];
      next[r] = read_slab<V>(a, row, start + kSpan + (r * Team + lane) * V);
    }
    use(start, now);
  }
}

template <int V, int Act> __device__ __forceinline__ int above_floor(const uint32_t (&order)[V]) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) count += order[i] > kFloor<Act>;
  return count;
}

// kTeam threads serve a row, kRows rows a block; kGroups maxima per thread; a buffer of kCapacity keys per row.
template <int Team_, int Rows_, int Groups_, int Capacity_> struct SelectPlan {
  static constexpr int kTeam = Team_, kRows = Rows_, kGroups = Groups_, kCapacity = Capacity_;
  static constexpr int kThreads = kTeam * kRows;
  static_assert(kTeam == kWarp || kRows == 1, "teams of several warps meet at the block's barrier");
};
using SelectTo32 = SelectPlan<32, 8, 4, 256>;
using SelectTo64 = SelectPlan<32, 8, 8, 256>;
using SelectTo128 = SelectPlan<32, 4, 16, 512>;
using SelectTo1024 = SelectPlan<256, 1, 16, 4096>;
constexpr int kLargestSelect = 1024;

template <class P> __device__ __forceinline__ void team_sync() {
  if (P::kTeam == kWarp) __syncwarp();
  else __syncthreads();
}
template <class P> __device__ __forceinline__ bool team_any(bool x) {
  return P::kTeam == kWarp ? __any_sync(kAllLanes, x) : __syncthreads_or(x);
}
template <class P> __device__ __forceinline__ int team_count(int x, int* partial) {
  const int warp = __reduce_add_sync(kAllLanes, x);
  if (P::kTeam == kWarp) return warp;
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = warp;
  __syncthreads();
  int total = 0;
  for (int w = 0; w < P::kTeam / kWarp; ++w) total += partial[w];
  __syncthreads();
  return total;
}

// Bitonic, in shared memory: what stands from `count` to the next power of two at or above max(count, least) becomes 0.
template <class P> __device__ void sort_descending(uint64_t* keys, int count, int least, int lane) {
  int n = 2;
  while (n < count || n < least) n *= 2;
  for (int i = count + lane; i < n; i += P::kTeam) keys[i] = 0;
  for (int size = 2; size <= n; size *= 2)
    for (int stride = size / 2; stride > 0; stride /= 2) {
      team_sync<P>();
      for (int pair = lane; pair < n / 2; pair += P::kTeam) {
        const int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
        const uint64_t x = keys[low], y = keys[high];
        if ((x < y) == ((low & size) == 0)) keys[low] = y, keys[high] = x;
      }
    }
  team_sync<P>();
}

// Reads of V in flight per thread.
template <int V, bool Limited> constexpr int kFlight = V > 1 && !Limited ? 4 : 1;

// A bound that at least k orders of the row pass: one less than the k-th largest group maximum, its lowest byte left
// out.
template <class P, int V, int Act, bool Limited>
__device__ uint32_t group_bound(const SelectArgs& a, const float* row, int lane, int* partial) {
  constexpr int kReads = P::kGroups > V ? P::kGroups / V : 1, kFew = kFlight<V, Limited>;
  constexpr int kAtOnce = kReads > kFew ? kReads : kFew;
  uint32_t best[kReads * V] = {};
  over_columns<P::kTeam, V, kAtOnce>(a, row, lane, [&](int start, Pack<float, V>(&read)[kAtOnce]) {
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      uint32_t order[V];
      to_orders<V, Act, Limited>(a, start + (r * P::kTeam + lane) * V, read[r], order);
#pragma unroll
      for (int i = 0; i < V; ++i) best[r % kReads * V + i] = max(best[r % kReads * V + i], order[i]);
    }
  });
  uint32_t bound = 0;
  for (uint32_t bit = kSign; bit > 0x80; bit /= 2) {
    const uint32_t trial = bound | bit;
    int reach = 0;
#pragma unroll
    for (int g = 0; g < kReads * V; ++g) reach += best[g] >= trial;
    if (team_count<P>(reach, partial) >= a.k) bound = trial;
  }
  return bound > 0 ? bound - 1 : 0;
}

// The keys that a row has kept, in shared memory. Which thread gets which place does not matter: keys are distinct, and
// sorted in the end. Of a warp, `count` is the same in all lanes; a block counts in shared memory.
template <class P> struct Buffer {
  static constexpr bool kOfWarp = P::kTeam == kWarp;
  uint64_t* keys;
  int* shared_count;
  int count = 0;
  bool trimmed = false;

  // The k best so far, in any order; returns the lowest order among them.
  __device__ __forceinline__ uint32_t refill(const uint64_t* from, int k, int lane) {
    uint32_t lowest = 0xffffffffu;
    for (int j = lane; j < k; j += P::kTeam) {
      keys[j] = from[j];
      lowest = min(lowest, order_in(keys[j]));
    }
    set_count(k, lane);
    if (kOfWarp) return ~__reduce_max_sync(kAllLanes, ~lowest);
    return order_in(from[k - 1]);  // a block's are in order
  }
  __device__ __forceinline__ void set_count(int n, int lane) {
    count = n;
    if (kOfWarp) return;
    if (lane == 0) *shared_count = n;
    __syncthreads();
  }

  // What passes the bound.
  template <int V>
  __device__ __forceinline__ void append(const uint32_t (&order)[V], const float (&pre)[V], uint32_t bound, int latent) {
    const int lane = threadIdx.x % kWarp;
    unsigned votes[V];
    int total = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) total += __popc(votes[i] = __ballot_sync(kAllLanes, order[i] > bound));
    int place = count;
    if constexpr (!kOfWarp) {
      place = lane == 0 && total > 0 ? atomicAdd(shared_count, total) : 0;
      place = __shfl_sync(kAllLanes, place, 0);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int ahead = __popc(votes[i] & ((1u << lane) - 1));
      if (order[i] > bound) keys[place + ahead] = key_of(order[i], latent + i, pre[i] < 0);
      place += __popc(votes[i]);
    }
    count = place;
    if constexpr (!kOfWarp) {
      __syncthreads();
      count = *shared_count;
      __syncthreads();
    }
  }

  // Makes room: the k best stay, or a few more; returns an order that all of them reach.
  __device__ __forceinline__ uint32_t trim(int k, int most, int lane) {
    uint32_t bound;
    if constexpr (kOfWarp) {
      count = cut<P::kCapacity / kWarp>(keys, count, k, most, [](uint64_t key) { return key; }, bound);
    } else {
      sort_descending<P>(keys, count, k, lane);
      bound = order_in(keys[k - 1]);
      set_count(k, lane);
    }
    return bound;
  }
};

// Adds what a row's columns bring; `passed` counts what is above the floor.
template <class P, int V, int Act, bool Limited>
__device__ __forceinline__ void add_columns(const SelectArgs& a, const float* row, uint32_t bound, int lane,
                                            Buffer<P>& best, int& passed) {
  constexpr int kReads = kFlight<V, Limited>;
  over_columns<P::kTeam, V, kReads>(a, row, lane, [&](int start, Pack<float, V>(&read)[kReads]) {
    uint32_t order[kReads][V];
    bool passes[kReads] = {}, any = false;
#pragma unroll
    for (int r = 0; r < kReads; ++r) {
      to_orders<V, Act, Limited>(a, start + (r * P::kTeam + lane) * V, read[r], order[r]);
      if constexpr (Limited) passed += above_floor<V, Act>(order[r]);
#pragma unroll
      for (int i = 0; i < V; ++i) passes[r] |= order[r][i] > bound;
      any |= passes[r];
    }
    if (!team_any<P>(any)) return;
#pragma unroll
    for (int r = 0; r < kReads; ++r) {
      if (kReads > 1 && !team_any<P>(passes[r])) continue;
      best.template append<V>(order[r], read[r].at, bound, a.first + start + (r * P::kTeam + lane) * V);
      if (best.count + P::kTeam * V <= P::kCapacity) continue;
      bound = max(bound, best.trim(a.k, min(a.k + kSlack, P::kCapacity - P::kTeam * V), lane));
      best.trimmed = true;
    }
  });
}

template <class P, int V, int Act, bool Limited> __device__ void select_best(const SelectArgs& a) {
  __shared__ uint64_t buffers[P::kRows * P::kCapacity];
  __shared__ int counts[P::kRows];
  __shared__ int partial[P::kTeam / kWarp];
  const int lane = threadIdx.x % P::kTeam, slot = threadIdx.x / P::kTeam;
  const int64_t number = int64_t(blockIdx.x) * P::kRows + slot;
  if (number >= a.rows) return;  // a whole warp, and no barrier of the block follows where it has several rows
  const float* row = a.slab + number * a.stride;
  Buffer<P> best{buffers + slot * P::kCapacity, counts + slot};
  uint32_t bound;
  if (a.filled) {
    bound = best.refill(a.keys + number * a.k, a.k, lane);
  } else {
    bound = group_bound<P, V, Act, Limited>(a, row, lane, partial);
    best.set_count(0, lane);
  }
  int passed = 0;
  add_columns<P, V, Act, Limited>(a, row, bound, lane, best, passed);
  if constexpr (Limited) {
    passed = team_count<P>(passed, partial);
    if (lane == 0) a.passed[number] += passed;
  }
  const bool changed = !a.filled || best.count > a.k || best.trimmed;
  if (best.trimmed && lane == 0) atomicAdd(a.trims, 1);
  if (!changed && !a.last) return;
  if (P::kTeam == kWarp && best.count > a.k) best.trim(a.k, a.k, lane);
  if (P::kTeam != kWarp || a.last) sort_descending<P>(best.keys, best.count, a.k, lane);
  else team_sync<P>();
  for (int j = lane; j < a.k; j += P::kTeam) {
    const int64_t at = number * a.k + j;
    const uint64_t key = j < best.count ? best.keys[j] : 0;
    if (a.last) write_code(a.values, a.indices, a.dtype, at, key, Act == kAbs);
    else a.keys[at] = key;
  }
}

template <class P, int V, int Act> __global__ void __launch_bounds__(P::kThreads, 2) select_rows(SelectArgs a) {
  select_best<P, V, Act, false>(a);
}
// With thresholds: a block per multiprocessor is enough, or the registers would not do.
template <class P, int Act> __global__ void __launch_bounds__(P::kThreads, 1) select_limited_rows(SelectArgs a) {
  select_best<P, 1, Act, true>(a);
}

// For a k beyond the buffers: the keys of whole rows, to be sorted elsewhere, and the way back. Signed 64-bit integers
// sort the way the keys do once their highest bit is flipped.
constexpr uint64_t kFlip = uint64_t(1) << 63;
constexpr int kElementThreads = 256;

template <int Act, bool Limited> __global__ void __launch_bounds__(kElementThreads) write_keys(SelectArgs a) {
  const int column = blockIdx.x * kElementThreads + threadIdx.x;
  if (column >= a.columns) return;
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    Pack<float, 1> read = read_slab<1>(a, a.slab + row * a.stride, column);
    uint32_t order[1];
    to_orders<1, Act, Limited>(a, column, read, order);
    a.keys[row * a.columns + column] = key_of(order[0], a.first + column, read.at[0] < 0) ^ kFlip;
    if (Limited && above_floor<1, Act>(order)) atomicAdd(a.passed + row, 1);
  }
}

template <int Act> __global__ void __launch_bounds__(kElementThreads) write_codes(SelectArgs a) {
  const int64_t at = int64_t(blockIdx.x) * kElementThreads + threadIdx.x;
  if (at < a.rows * a.k) write_code(a.values, a.indices, a.dtype, at, a.keys[at] ^ kFlip, Act == kAbs);
}

}  // namespace sae_kernels
