// What the selections compete with: 64-bit keys, of the score, then the lower latent, then the sign that `abs` hides;
// and what a warp does with a buffer of them.
#pragma once

#include "cuda/device.cuh"

namespace sae_kernels {

enum Activation : int { kRelu = 0, kNone = 1, kAbs = 2 };

// Orders rise with the score. 0: no latent at all; 1: a latent that does not compete; what follows: -inf to inf; last:
// NaN.
constexpr uint32_t kMasked = 1, kNanOrder = 0xffffffffu, kSign = 0x80000000u;

// Signed 64-bit integers sort the way keys do once their highest bit is flipped.
constexpr uint64_t kFlip = uint64_t(1) << 63;

template <int Act> __device__ __forceinline__ uint32_t order_of(float pre) {
  if (pre != pre) return kNanOrder;
  if (Act == kRelu) return __float_as_uint(pre > 0 ? pre : 0.0f) | kSign;
  if (Act == kAbs) return __float_as_uint(fabsf(pre)) | kSign;
  const uint32_t bits = __float_as_uint(pre + 0.0f);  // -0 becomes 0
  return bits & kSign ? ~bits : bits | kSign;
}
// Of the lowest score.
template <int Act> constexpr uint32_t kFloor = Act == kNone ? ~0xff800000u : kSign;
__device__ __forceinline__ uint64_t key_of(uint32_t order, int latent, bool negative) {
  return uint64_t(order) << 32 | (0x7fffffffu - uint32_t(latent)) << 1 | uint32_t(negative);
}
__device__ __forceinline__ uint32_t order_in(uint64_t key) { return uint32_t(key >> 32); }
__device__ __forceinline__ int latent_in(uint64_t key) { return int(0x7fffffffu - (uint32_t(key) >> 1)); }
__device__ __forceinline__ float value_in(uint64_t key, bool is_abs) {
  const uint32_t order = order_in(key);
  if (order <= kMasked) return 0.0f;
  if (order == kNanOrder) return nan_value();
  const float score = __uint_as_float(order & kSign ? order ^ kSign : ~order);
  return is_abs && (key & 1) ? -score : score;
}

__device__ __forceinline__ float score_at(uint32_t order) { return value_in(uint64_t(order) << 32, false); }

// A latent that may be among the best as it stands in a buffer: the lower half of its key, without the sign; above it,
// its pre-activation.
__device__ __forceinline__ uint32_t low_half_of(int latent) { return (0x7fffffffu - uint32_t(latent)) << 1; }
__device__ __forceinline__ uint64_t entry_of(float pre, int latent) {
  return uint64_t(__float_as_uint(pre)) << 32 | low_half_of(latent);
}

template <class T> __device__ __forceinline__ void put(void* out, int64_t at, float value) {
  from_acc(value, static_cast<T*>(out)[at]);
}
__device__ __forceinline__ void write_code(void* values, int32_t* indices, Out dtype, int64_t at, uint64_t key,
                                           bool is_abs) {
  const float value = value_in(key, is_abs);
  if (dtype == Out::kFloat) put<float>(values, at, value);
  else if (dtype == Out::kBFloat16) put<bf16>(values, at, value);
  else put<fp16>(values, at, value);
  indices[at] = latent_in(key);
}

constexpr int kSlack = 8;  // keys beyond k that a cut may leave, which spares it half of its steps

// A bound that `least` of the warp's numbers reach, 0 standing for none: the largest one, or one that at most `most`
// reach. `reach` is how many do.
template <int N>
__device__ __forceinline__ uint32_t warp_bound(const uint32_t (&of)[N], int least, int most, int& reach) {
  uint32_t low = 0xffffffffu, high = 0;
  int count = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    high = max(high, of[i]);
    low = min(low, of[i] > 0 ? of[i] : 0xffffffffu);
    count += __popc(__ballot_sync(kAllLanes, of[i] > 0));
  }
  high = __reduce_max_sync(kAllLanes, high);
  low = ~__reduce_max_sync(kAllLanes, ~low);
  reach = count;
  while (reach > most && low < high) {
    const uint32_t trial = low + (high - low + 1) / 2;
    count = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) count += __popc(__ballot_sync(kAllLanes, of[i] >= trial));
    if (count >= least) low = trial, reach = count;
    else high = trial - 1;
  }
  return low;
}

// Cuts a warp's buffer down to at most `most` entries, `least` of them the best. from(i): where the lane's i-th entry
// stands, or -1; read(entry): its key; to(j): where the j-th of those that stay is put. Returns how many stay, in any
// order; `bound` is the order of a score that all of them reach. The whole warp calls.
template <int Keys, class From, class Read, class To>
__device__ __forceinline__ int cut(uint64_t* buffer, From from, int least, int most, Read read, To to,
                                   uint32_t& bound) {
  const int lane = threadIdx.x % kWarp;
  uint64_t entry[Keys];
  uint32_t order[Keys];
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Keys; ++i) {
    const int at = from(i);
    entry[i] = at >= 0 ? buffer[at] : 0;
    order[i] = at >= 0 ? order_in(read(entry[i])) : 0;
  }
  int reach;
  bound = warp_bound(order, least, most, reach);
  if (reach > most) {  // equal scores: the lowest latents of those at the bound
    uint32_t low[Keys];
    int above = 0;
#pragma unroll
    for (int i = 0; i < Keys; ++i) {
      above += __popc(__ballot_sync(kAllLanes, order[i] > bound));
      low[i] = order[i] == bound ? uint32_t(read(entry[i])) : 0;
    }
    const uint32_t last = warp_bound(low, least - above, most - above, reach);
#pragma unroll
    for (int i = 0; i < Keys; ++i) order[i] = order[i] == bound && low[i] < last ? 0 : order[i];
  }
  int kept = 0;
#pragma unroll
  for (int i = 0; i < Keys; ++i) {
    const unsigned votes = __ballot_sync(kAllLanes, order[i] >= bound);
    if (order[i] >= bound) buffer[to(kept + __popc(votes & ((1u << lane) - 1)))] = entry[i];
    kept += __popc(votes);
  }
  __syncwarp();
  return kept;
}

// One step of a bitonic sort of Rows sequences of 32 N keys, between lanes; of a sequence, lane l's i-th is the
// (32 i + l)-th.
template <int Rows, int N>
__device__ __forceinline__ void exchange(uint64_t (&key)[Rows * N], int size, int stride) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < Rows * N; ++i) {
    const bool descending = ((i % N * kWarp + lane) & size) == 0 || size == N * kWarp;
    const uint64_t other = __shfl_xor_sync(kAllLanes, key[i], stride);
    key[i] = (key[i] > other) == (descending == ((lane & stride) == 0)) ? key[i] : other;
  }
}
// Each of the sequences in descending order; N is a power of two.
template <int Rows, int N> __device__ __forceinline__ void sort_keys(uint64_t (&key)[Rows * N]) {
#pragma unroll 1
  for (int size = 2; size <= kWarp; size *= 2)
#pragma unroll 1
    for (int stride = size / 2; stride > 0; stride /= 2) exchange<Rows, N>(key, size, stride);
#pragma unroll
  for (int regs = 2; regs <= N; regs *= 2) {
#pragma unroll
    for (int apart = regs / 2; apart > 0; apart /= 2)
#pragma unroll
      for (int i = 0; i < Rows * N; ++i) {
        if (i & apart) continue;
        const uint64_t x = key[i], y = key[i + apart];
        const bool swap = (x < y) == ((i & regs) == 0 || regs == N);
        key[i] = swap ? y : x;
        key[i + apart] = swap ? x : y;
      }
#pragma unroll 1
    for (int stride = kWarp / 2; stride > 0; stride /= 2) exchange<Rows, N>(key, regs * kWarp, stride);
  }
}
// The 32 largest of two descending sequences of 32, descending.
__device__ __forceinline__ uint64_t merge_warp(uint64_t a, uint64_t b) {
  const int lane = threadIdx.x % kWarp;
  uint64_t key = max(a, __shfl_sync(kAllLanes, b, kWarp - 1 - lane));
  for (int stride = kWarp / 2; stride > 0; stride /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, key, stride);
    key = (key > other) == ((lane & stride) == 0) ? key : other;
  }
  return key;
}

}  // namespace sae_kernels
