// The k best of every row of a slab of pre-activations, exact: larger score first, NaN above all, equal scores by the
// lower latent. One team of threads per row, a warp or a block. A first pass takes maxima of strided groups: the k-th
// largest of them has k scores at or above it, so what lies below is out. A second pass puts what is left into a buffer
// in shared memory. Where that fills up (ties, unlucky orders) it is trimmed early, its k best and a few more stay, and
// the bound rises to the lowest of them: columns come in ascending order, so every input gives the exact result. What
// the last chunk leaves is sorted. Reads the slab twice, from L2 where it fits there; chunks of latents after the first
// are read once.
#pragma once

#include "cuda/topk_slab.cuh"

namespace sae_kernels {

// The keys that a block has kept of its row, in shared memory. Which thread gets which place does not matter: keys are
// distinct, and sorted in the end.
template <class P> struct BlockBuffer {
  uint64_t* keys;
  int* shared_count;
  int count = 0;
  bool trimmed = false;

  // The k best so far, in order; returns the lowest order among them.
  __device__ __forceinline__ uint32_t refill(const SelectArgs& a, const uint64_t* from, int lane) {
    for (int j = lane; j < a.k; j += P::kTeam) keys[j] = from[j];
    set_count(a.k, lane);
    return order_in(from[a.k - 1]);
  }
  __device__ __forceinline__ void set_count(int n, int lane) {
    count = n;
    if (lane == 0) *shared_count = n;
    __syncthreads();
  }
  // What passes the bound.
  template <int V> __device__ __forceinline__ void append(const uint32_t (&order)[V], const float (&pre)[V],
                                                          uint32_t bound, int latent) {
    const int lane = threadIdx.x % kWarp;
    unsigned votes[V];
    int total = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) total += __popc(votes[i] = __ballot_sync(kAllLanes, order[i] > bound));
    int place = lane == 0 && total > 0 ? atomicAdd(shared_count, total) : 0;
    place = __shfl_sync(kAllLanes, place, 0);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int ahead = __popc(votes[i] & ((1u << lane) - 1));
      if (order[i] > bound) keys[place + ahead] = key_of(order[i], latent + i, pre[i] < 0);
      place += __popc(votes[i]);
    }
    __syncthreads();
    count = *shared_count;
    __syncthreads();
  }
  // Makes room: the k best stay; returns the lowest order among them.
  __device__ __forceinline__ uint32_t trim(int k, int lane) {
    sort_descending<P>(keys, count, k, lane);
    set_count(k, lane);
    trimmed = true;
    return order_in(keys[k - 1]);
  }
};

// Adds what a row's columns bring.
template <class P, int V, int Act>
__device__ __forceinline__ void add_columns(const SelectArgs& a, const float* row, uint32_t bound, int lane,
                                            BlockBuffer<P>& best) {
  constexpr int kReads = kFlight<V>;
  over_columns<P::kTeam, V, kReads>(a, row, lane, [&](int start, Pack<float, V>(&read)[kReads]) {
    uint32_t order[kReads][V];
    bool passes[kReads] = {}, any = false;
#pragma unroll
    for (int r = 0; r < kReads; ++r) {
      to_orders<V, Act>(a, start + (r * P::kTeam + lane) * V, read[r], order[r]);
#pragma unroll
      for (int i = 0; i < V; ++i) passes[r] |= order[r][i] > bound;
      any |= passes[r];
    }
    if (!__syncthreads_or(any)) return;
#pragma unroll
    for (int r = 0; r < kReads; ++r) {
      if (kReads > 1 && !__syncthreads_or(passes[r])) continue;
      best.template append<V>(order[r], read[r].at, bound, a.first + start + (r * P::kTeam + lane) * V);
      if (best.count + P::kTeam * V > P::kCapacity) bound = max(bound, best.trim(a.k, lane));
    }
  });
}

// What a warp has kept of its row, as entries of topk_keys.cuh: entry i of lane l stands at 32 i + l, so that no lane
// has to ask another where to put one.
template <class P, int Act> struct WarpBuffer {
  static constexpr int kLaneEntries = P::kCapacity / kWarp, kStep = kWarp * int(sizeof(uint64_t));
  const SelectArgs& a;
  uint64_t* entries;
  int used = 0;      // of the lane's, in steps of kStep bytes
  bool trimmed = false, full = false;  // full: k are there, so that no latent can join that does not compete
  float bound;       // scores up to it are out; NaN: none is

  __device__ __forceinline__ int lane() const { return threadIdx.x % kWarp; }
  // The key of an entry.
  __device__ __forceinline__ uint64_t operator()(uint64_t entry) const {
    const float pre = __uint_as_float(uint32_t(entry >> 32));
    const int latent = latent_in(entry);
    const bool competes = !a.mask || a.mask[latent];
    return key_of(competes ? order_of<Act>(pre) : kMasked, latent, pre < 0);
  }
  __device__ __forceinline__ void raise_to(uint32_t order) {
    if (order == kSign - 1) --order;  // -0, which 0 would not pass
    bound = order < kFloor<Act> ? nan_value() : order == kNanOrder ? __builtin_huge_valf() : score_at(order);
  }
  __device__ __forceinline__ void set_count(int n) { used = (n + kWarp - 1 - lane()) / kWarp * kStep; }
  // The k best so far, in any order; 0 in the place of those that are still missing, after the others.
  __device__ __forceinline__ void refill(const uint64_t* keys) {
    uint32_t lowest = 0xffffffffu;
    int some = 0;
    for (int j = lane(); j < a.k; j += kWarp) {
      const uint64_t key = keys[j];
      entries[j] = entry_of(value_in(key, Act == kAbs), latent_in(key));
      lowest = min(lowest, order_in(key));
      some += key > 0;
    }
    some = __reduce_add_sync(kAllLanes, some);
    set_count(some);
    full = some == a.k;
    raise_to(~__reduce_max_sync(kAllLanes, ~lowest));
  }
  // Down to the k best, or to at most `most`; returns how many there are.
  __device__ __forceinline__ int trim(int most) {
    const int count = used / kStep;
    uint32_t order;
    const auto from = [&](int i) { return i < count ? i * kWarp + lane() : -1; };
    const int kept = cut<kLaneEntries>(entries, from, a.k, most, *this, [](int j) { return j; }, order);
    set_count(kept);
    full = kept >= a.k;
    if (full) raise_to(order);
    return kept;
  }
  __device__ __forceinline__ bool passes(float pre) const { return !((Act == kAbs ? fabsf(pre) : pre) <= bound); }
  template <int V> __device__ __forceinline__ bool fits(const float (&pre)[V], unsigned out) const {
    if (!__any_sync(kAllLanes, used > (kLaneEntries - V) * kStep)) return true;
    int after = used;
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (!(out >> i & 1) && passes(pre[i])) after += kStep;
    return !__any_sync(kAllLanes, after > kLaneEntries * kStep);
  }
  template <int V, bool Masked>
  __device__ __forceinline__ void put(const float (&pre)[V], unsigned out, int latent) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if ((Masked && (out >> i & 1)) || !passes(pre[i])) continue;
      auto* at = reinterpret_cast<uint32_t*>(reinterpret_cast<unsigned char*>(entries + lane()) + used);
      at[0] = low_half_of(latent + i);
      at[1] = __float_as_uint(pre[i]);
      used += kStep;
    }
  }
  // What passes the bound of columns `column` on, pack by pack, but for those in `out`, which is empty unless Masked.
  // They come in ascending order: of equal scores the first ones stay.
  template <bool Masked, int V, int R>
  __device__ __forceinline__ void append(const Pack<float, V> (&pre)[R], const unsigned (&out)[R], int column) {
    for (int done = 0;;) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int at = column + r * kWarp * V;
        if (done != r || !fits<V>(pre[r].at, at < a.columns ? Masked ? out[r] : 0 : ~0u)) continue;
        if (at < a.columns) put<V, Masked>(pre[r].at, out[r], a.first + at);
        done = r + 1;
      }
      if (done == R) return;
      trim(min(a.k + kSlack, (kLaneEntries - V) * kWarp));
      trimmed = true;
    }
  }
};

// A pre-activation of the lowest score.
template <int Act> constexpr float kLowest = Act == kNone ? -__builtin_huge_valf() : 0.0f;

// The same for a warp; what a mask leaves out comes as the lowest score, or not at all.
template <bool Masked, class P, int V, int Act>
__device__ __forceinline__ void add_columns(const SelectArgs& a, const float* row, WarpBuffer<P, Act>& best) {
  constexpr int kReads = kFlight<V>;
  const int lane = threadIdx.x % kWarp;
  over_columns<kWarp, V, kReads>(a, row, lane, [&](int start, Pack<float, V>(&read)[kReads]) {
    unsigned out[kReads] = {};
#pragma unroll
    for (int r = 0; r < kReads; ++r) {
      const int column = start + (r * kWarp + lane) * V;
      const int latent = a.first + (column < a.columns ? column : 0);
      float(&pre)[V] = read[r].at;
      if (a.bias) add_pack<V>(pre, a.bias + latent);
      if constexpr (Masked) {
        const Pack<uint8_t, V> mask = load_pack<V>(a.mask + latent);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          pre[i] = mask.at[i] ? pre[i] : kLowest<Act>;
          out[r] |= best.full && !mask.at[i] ? 1u << i : 0;
        }
      }
    }
    best.template append<Masked>(read, out, start + lane * V);
  });
}

template <class P, int V, int Act>
__device__ void select_best_of_warp(const SelectArgs& a, const float* row, int64_t number, uint64_t* entries) {
  const int lane = threadIdx.x % kWarp;
  WarpBuffer<P, Act> best{a, entries};
  if (a.filled) best.refill(a.keys + number * a.k);
  else best.raise_to(group_bound<P, V, Act>(a, row, lane, nullptr));
  const bool was_full = best.full;
  if (a.mask) add_columns<true, P, V, Act>(a, row, best);
  else add_columns<false, P, V, Act>(a, row, best);
  if (best.trimmed && lane == 0) atomicAdd(a.trims, 1);
  const bool more = __reduce_add_sync(kAllLanes, best.used) > a.k * best.kStep;
  if (was_full && !more && !best.trimmed && !a.last) return;  // as before
  const int kept = best.trim(a.k);
  for (int j = lane; j < kept; j += kWarp) entries[j] = best(entries[j]);
  __syncwarp();
  if (a.last) sort_descending<P>(entries, kept, a.k, lane);
  for (int j = lane; j < a.k; j += kWarp) {
    const int64_t at = number * a.k + j;
    const uint64_t key = j < kept ? entries[j] : 0;
    if (a.last) write_code(a.values, a.indices, a.dtype, at, key, Act == kAbs);
    else a.keys[at] = key;
  }
}

template <class P, int V, int Act>
__device__ void select_best_of_block(const SelectArgs& a, const float* row, int64_t number, uint64_t* keys) {
  __shared__ int count;
  __shared__ int partial[P::kTeam / kWarp];
  const int lane = threadIdx.x;
  BlockBuffer<P> best{keys, &count};
  uint32_t bound;
  if (a.filled) {
    bound = best.refill(a, a.keys + number * a.k, lane);
  } else {
    bound = group_bound<P, V, Act>(a, row, lane, partial);
    best.set_count(0, lane);
  }
  const bool was_full = best.count == a.k;
  add_columns<P, V, Act>(a, row, bound, lane, best);
  if (best.trimmed && lane == 0) atomicAdd(a.trims, 1);
  if (was_full && best.count <= a.k && !best.trimmed && !a.last) return;  // as before
  sort_descending<P>(keys, best.count, a.k, lane);
  for (int j = lane; j < a.k; j += P::kTeam) {
    const int64_t at = number * a.k + j;
    const uint64_t key = j < best.count ? keys[j] : 0;
    if (a.last) write_code(a.values, a.indices, a.dtype, at, key, Act == kAbs);
    else a.keys[at] = key;
  }
}

template <class P, int V, int Act> __global__ void __launch_bounds__(P::kThreads, 2) select_rows(SelectArgs a) {
  __shared__ uint64_t buffers[P::kRows * P::kCapacity];
  const int slot = threadIdx.x / P::kTeam;
  const int64_t number = int64_t(blockIdx.x) * P::kRows + slot;
  if (number >= a.rows) return;  // a whole warp, and no barrier of the block follows where it has several rows
  const float* row = a.slab + number * a.stride;
  uint64_t* buffer = buffers + slot * P::kCapacity;
  if constexpr (P::kTeam == kWarp) select_best_of_warp<P, V, Act>(a, row, number, buffer);
  else select_best_of_block<P, V, Act>(a, row, number, buffer);
}

// For a k beyond the buffers: the keys of whole rows, to be sorted elsewhere, and the way back.
constexpr int kElementThreads = 256;

// Limited: what does not pass its threshold or the mask becomes the lowest score there is, and fills up.
template <int Act, bool Limited> __global__ void __launch_bounds__(kElementThreads) write_keys(SelectArgs a) {
  const int column = blockIdx.x * kElementThreads + threadIdx.x;
  if (column >= a.columns) return;
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    Pack<float, 1> read = read_slab<1>(a, a.slab + row * a.stride, column);
    uint32_t order[1];
    to_orders<1, Act>(a, column, read, order);
    if constexpr (Limited) {
      const float score = Act == kAbs ? fabsf(read.at[0]) : read.at[0];
      const bool passes = order[0] != kMasked && !(score <= a.threshold[int64_t(column) * a.threshold_step]);
      if (passes) atomicAdd(a.passed + row, 1);
      else order[0] = kFloor<Act>;
    }
    a.keys[row * a.columns + column] = key_of(order[0], a.first + column, read.at[0] < 0) ^ kFlip;
  }
}

template <int Act> __global__ void __launch_bounds__(kElementThreads) write_codes(SelectArgs a) {
  const int64_t at = int64_t(blockIdx.x) * kElementThreads + threadIdx.x;
  if (at < a.rows * a.k) write_code(a.values, a.indices, a.dtype, at, a.keys[at] ^ kFlip, Act == kAbs);
}

}  // namespace sae_kernels
