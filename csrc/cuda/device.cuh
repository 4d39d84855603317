// What the kernels share: storage types in and out of their accumulator, vectors of 16 bytes. Free of torch and of
// launches; no preprocessor switch tells a GPU from the host execution of tests/cuda_host, which brings its own
// cuda_runtime.h.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cpu/isa.h"

namespace sae_kernels {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float to_acc(fp16 x) { return __half2float(__ushort_as_half(x.bits)); }

__device__ __forceinline__ void from_acc(float x, float& out) { out = x; }
__device__ __forceinline__ void from_acc(double x, double& out) { out = x; }
__device__ __forceinline__ void from_acc(float x, fp16& out) { out.bits = __half_as_ushort(__float2half_rn(x)); }
// to the nearest, ties to even; NaN stays NaN
__device__ __forceinline__ void from_acc(float x, bf16& out) {
  const uint32_t bits = __float_as_uint(x);
  out.bits = x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

__device__ __forceinline__ float nan_value() { return __uint_as_float(0x7fc00000u); }

enum class Out : int { kFloat, kBFloat16, kHalf };  // dtype of a result whose kernel does not depend on it

// V neighbours, read and written in one access
template <class T, int V> struct alignas(sizeof(T) * V) Pack { T at[V]; };
template <class T> constexpr int kWide = 16 / sizeof(T);

template <int V, class T> __device__ __forceinline__ Pack<T, V> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <int V, class T> __device__ __forceinline__ void store_pack(T* p, const Acc<T> (&from)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) from_acc(from[i], pack.at[i]);
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// A row of d columns is taken in slices by teams of `lanes` threads with V columns each.
inline int lanes_for(int64_t d, int V) {
  int lanes = 1;
  while (lanes < kWarp && int64_t(lanes) * V < d) lanes *= 2;
  return lanes;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The sum over a team of `lanes` neighbouring threads, in one fixed order; the whole warp calls.
template <class A> __device__ __forceinline__ A team_sum(A x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

}  // namespace sae_kernels
