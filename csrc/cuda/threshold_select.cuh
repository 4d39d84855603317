// What of every row of a slab of pre-activations is above its latent's threshold, exact and in order: larger score
// first, NaN above all, equal scores by the lower latent. A warp reads its row once, from L2 where the slab fits there,
// and what passes goes into a buffer in shared memory. Where that is almost full it is cut back to about the k best,
// and what does not reach these is out: columns come in ascending order, so every input gives the exact result. Slots
// that nothing fills get the lowest latents that did not pass, found by a bit for each latent below k.
#pragma once

#include "cuda/topk_slab.cuh"

namespace sae_kernels {

// kRows rows a block, each with a buffer of kCapacity keys.
template <int Rows_, int Capacity_> struct ThresholdPlan {
  static constexpr int kRows = Rows_, kCapacity = Capacity_, kThreads = kRows * kWarp;
};
using ThresholdTo64 = ThresholdPlan<8, 256>;
using ThresholdTo128 = ThresholdPlan<4, 512>;
using ThresholdTo256 = ThresholdPlan<4, 1024>;
using ThresholdTo1024 = ThresholdPlan<2, 2048>;

// A bound that `least` of the warp's `count` words reach: the largest one, or one that at most `most` reach. `reach` is
// how many do.
template <class Word>
__device__ __forceinline__ uint32_t bound_of(int count, Word word, int least, int most, int& reach) {
  const int lane = threadIdx.x % kWarp;
  uint32_t low = ~0u, high = 0;
  for (int i = lane; i < count; i += kWarp) low = min(low, word(i)), high = max(high, word(i));
  high = __reduce_max_sync(kAllLanes, high);
  low = ~__reduce_max_sync(kAllLanes, ~low);
  reach = count;
  while (reach > most && low < high) {
    const uint32_t trial = low + (high - low - 1) / 2 + 1;
    int n = 0;
    for (int i = lane; i < count; i += kWarp) n += word(i) >= trial;
    n = __reduce_add_sync(kAllLanes, n);
    if (n >= least) low = trial, reach = n;
    else high = trial - 1;
  }
  return low;
}

// The keys that a warp has kept of its row, in any order.
template <int Capacity, bool Magnitude> struct PassedBuffer {
  uint64_t* keys;
  int count = 0;
  float bound = nan_value();  // scores up to it are out; NaN: none is
  bool changed = false;

  __device__ __forceinline__ static uint32_t order(float pre) { return order_of<Magnitude ? kAbs : kNone>(pre); }
  __device__ __forceinline__ void raise_to(uint32_t order) {
    bound = order == kNanOrder ? __builtin_huge_valf() : score_at(order);
  }
  // What chunks of latents before have left, k or fewer.
  __device__ __forceinline__ void refill(const uint64_t* from, int n, int k) {
    uint32_t lowest = ~0u;
    for (int j = threadIdx.x % kWarp; j < n; j += kWarp) {
      keys[j] = from[j];
      lowest = min(lowest, order_in(keys[j]));
    }
    count = n;
    if (n == k) raise_to(~__reduce_max_sync(kAllLanes, ~lowest));
  }
  // Down to at most `most` keys, the k best among them; there are more than that.
  __device__ void cut(int k, int most) {
    const int lane = threadIdx.x % kWarp;
    __syncwarp();
    int reach;
    const uint32_t least = bound_of(count, [&](int i) { return order_in(keys[i]); }, k, most, reach);
    uint32_t last = 0;
    if (reach > most) {  // equal scores: the lowest latents of those at the bound
      const auto low_half = [&](int i) {
        const uint32_t order = order_in(keys[i]);
        return order > least ? ~0u : order == least ? uint32_t(keys[i]) : 0;
      };
      last = bound_of(count, low_half, k, most, reach);
    }
    int kept = 0;
    for (int first = 0; first < count; first += kWarp) {
      const uint64_t key = first + lane < count ? keys[first + lane] : 0;
      const bool stays = order_in(key) > least || (order_in(key) == least && uint32_t(key) >= last);
      const unsigned votes = __ballot_sync(kAllLanes, stays);
      if (stays) keys[kept + __popc(votes & ((1u << lane) - 1))] = key;
      kept += __popc(votes);
    }
    __syncwarp();
    count = kept;
    changed = true;
    raise_to(least);
  }
  // Of a pack those of `in`, a bit for each; `latent` is the first one's.
  template <int V> __device__ __forceinline__ void put(const float (&pre)[V], unsigned in, int latent) {
    const unsigned before = (1u << threadIdx.x % kWarp) - 1;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const unsigned votes = __ballot_sync(kAllLanes, in >> i & 1);
      if (in >> i & 1) keys[count + __popc(votes & before)] = key_of(order(pre[i]), latent + i, pre[i] < 0);
      count += __popc(votes);
    }
    changed = true;
  }
  // Pack by pack, the r-th from `latent` + 32 r V on.
  template <int V, int R>
  __device__ __forceinline__ void append(const Pack<float, V> (&pre)[R], const unsigned (&in)[R], int latent, int k) {
    for (int done = 0;;) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (done != r) continue;
        if (__any_sync(kAllLanes, in[r])) {
          if (count > Capacity - V * kWarp) continue;
          put<V>(pre[r].at, in[r], latent + r * kWarp * V);
        }
        done = r + 1;
      }
      if (done == R) return;
      cut(k, k + k / 4 + kSlack);
    }
  }
};

// Puts what passes of a row into the buffer; returns how many of the lane's are above their thresholds.
template <int V, int Capacity, bool Magnitude>
__device__ __forceinline__ int add_passing(const SelectArgs& a, const float* row,
                                           PassedBuffer<Capacity, Magnitude>& best) {
  constexpr int kReads = kFlight<V>;
  const int lane = threadIdx.x % kWarp;
  const float one_for_all = a.threshold_step == 0 ? *a.threshold : 0.0f;
  int passed = 0;
  over_columns<kWarp, V, kReads>(a, row, lane, [&](int start, Pack<float, V>(&read)[kReads]) {
    unsigned in[kReads] = {};
#pragma unroll
    for (int r = 0; r < kReads; ++r) {
      const int column = start + (r * kWarp + lane) * V;
      const bool inside = column < a.columns;
      const int latent = a.first + (inside ? column : 0);
      float(&pre)[V] = read[r].at;
      if (a.bias) add_pack<V>(pre, a.bias + latent);
      Pack<float, V> limit;
      Pack<uint8_t, V> mask;
#pragma unroll
      for (int i = 0; i < V; ++i) limit.at[i] = one_for_all, mask.at[i] = 1;
      if (a.threshold_step > 0) limit = load_pack<V>(a.threshold + latent);
      if (a.mask) mask = load_pack<V>(a.mask + latent);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float score = Magnitude ? fabsf(pre[i]) : pre[i];
        const bool passes = inside && mask.at[i] && !(score <= limit.at[i]);
        passed += passes;
        in[r] |= passes && !(score <= best.bound) ? 1u << i : 0;
      }
    }
    best.append(read, in, a.first + start + lane * V, a.k);
  });
  return passed;
}

// Fills up behind a row's `count` keys: with latents below k, as fewer than k have passed. taken: a word of shared
// memory for every 32 of them.
__device__ __forceinline__ void fill_up(const SelectArgs& a, const uint64_t* keys, int count, unsigned* taken,
                                        int64_t row) {
  const int lane = threadIdx.x % kWarp;
  for (int w = lane; w * kWarp < a.k; w += kWarp) taken[w] = 0;
  __syncwarp();
  for (int j = lane; j < count; j += kWarp) {
    const int latent = latent_in(keys[j]);
    if (latent < a.k) atomicOr(taken + latent / kWarp, 1u << latent % kWarp);
  }
  __syncwarp();
  for (int first = 0; count < a.k; first += kWarp) {
    const unsigned free = ~taken[first / kWarp];
    const int at = count + __popc(free & ((1u << lane) - 1));
    if ((free >> lane & 1) && at < a.k)
      write_code(a.values, a.indices, a.dtype, row * a.k + at, key_of(kSign, first + lane, false), false);
    count += __popc(free);
  }
}

// 16 warps of a multiprocessor: left alone, ptxas spills a few addresses for more of them.
template <class P, int V, bool Magnitude> __global__ void __launch_bounds__(P::kThreads, 16 / P::kRows)
    select_passing(SelectArgs a) {
  __shared__ uint64_t buffers[P::kRows * P::kCapacity];
  const int lane = threadIdx.x % kWarp, slot = threadIdx.x / kWarp;
  const int64_t row = int64_t(blockIdx.x) * P::kRows + slot, begin = row * a.k;
  if (row >= a.rows) return;
  PassedBuffer<P::kCapacity, Magnitude> best{buffers + slot * P::kCapacity};
  const int before = a.filled ? a.passed[row] : 0;
  if (before > 0) best.refill(a.keys + begin, min(before, a.k), a.k);
  const int passed = __reduce_add_sync(kAllLanes, add_passing<V>(a, a.slab + row * a.stride, best));
  if (lane == 0) a.passed[row] = before + passed;
  if (!best.changed && !a.last) return;
  if (best.count > a.k) best.cut(a.k, a.k);
  __syncwarp();
  if (!a.last) {
    for (int j = lane; j < best.count; j += kWarp) a.keys[begin + j] = best.keys[j];
    return;
  }
  sort_descending<WarpTeam>(best.keys, best.count, 0, lane);
  for (int j = lane; j < best.count; j += kWarp)
    write_code(a.values, a.indices, a.dtype, begin + j, best.keys[j], Magnitude);
  if (best.count < a.k)
    fill_up(a, best.keys, best.count, reinterpret_cast<unsigned*>(best.keys + a.k), row);
}

}  // namespace sae_kernels
