// What the selection from slabs reads: pre-activations as they lie in memory, as orders, and a first bound from maxima
// of strided groups; and how a team of threads sorts.
#pragma once

#include "cuda/topk_keys.cuh"

namespace sae_kernels {

struct SelectArgs {
  const float* slab;    // [rows, columns], `stride` elements from row to row: latents first, first + 1, ...
  const float* bias;    // of all latents, or null
  const uint8_t* mask;  // of all latents, or null: 0 does not compete
  const float* threshold;  // of all latents, or with threshold_step 0 one for all; or null
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
template <int V>
__device__ __forceinline__ Pack<float, V> read_slab(const SelectArgs& a, const float* row, int column) {
  return load_pack<V>(row + (column < a.columns ? column : 0));
}
template <int V> __device__ __forceinline__ void add_pack(float (&to)[V], const float* from) {
  const Pack<float, V> pack = load_pack<V>(from);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] += pack.at[i];
}
// Their orders, 0 beyond the last column; pre becomes complete.
template <int V, int Act>
__device__ __forceinline__ void to_orders(const SelectArgs& a, int column, Pack<float, V>& read, uint32_t (&order)[V]) {
  const bool inside = column < a.columns;
  const int latent = a.first + (inside ? column : 0);
  float(&pre)[V] = read.at;
  if (a.bias) add_pack<V>(pre, a.bias + latent);
#pragma unroll
  for (int i = 0; i < V; ++i) order[i] = order_of<Act>(pre[i]);
  if (a.mask) {
    const Pack<uint8_t, V> mask = load_pack<V>(a.mask + latent);
#pragma unroll
    for (int i = 0; i < V; ++i) order[i] = mask.at[i] ? order[i] : kMasked;
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

struct WarpTeam { static constexpr int kTeam = kWarp; };

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
template <int V> constexpr int kFlight = V > 1 ? 4 : 1;

// A bound that at least k orders of the row pass: one less than the k-th largest group maximum, its lowest byte left
// out.
template <class P, int V, int Act>
__device__ uint32_t group_bound(const SelectArgs& a, const float* row, int lane, int* partial) {
  constexpr int kReads = P::kGroups > V ? P::kGroups / V : 1, kFew = kFlight<V>;
  constexpr int kAtOnce = kReads > kFew ? kReads : kFew;
  uint32_t best[kReads * V] = {};
  over_columns<P::kTeam, V, kAtOnce>(a, row, lane, [&](int start, Pack<float, V>(&read)[kAtOnce]) {
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      uint32_t order[V];
      to_orders<V, Act>(a, start + (r * P::kTeam + lane) * V, read[r], order);
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

}  // namespace sae_kernels
