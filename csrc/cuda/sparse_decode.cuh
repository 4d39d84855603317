// Weighted sums of chosen rows of W, and dot products with them, in gathers: codes of size rows x d_sae never exist.
// Every thread owns V neighbouring columns (16 bytes); a team of lanes covers one slice of a row. The grid runs over
// the rows first and the slices second, so at any time one slice of W is in use, which stays in L2.
// Reads rows x k x d_out elements of W from L2 and writes rows x d_out.
#pragma once

#include "cuda/device.cuh"

namespace sae_kernels {

constexpr int kDecodeThreads = 128;

// An index out of range is never followed: its row becomes NaN.
template <class T, class I> struct DecodeArgs {
  const T* values;   // [rows, k]
  const I* indices;  // [rows, k]
  const T* W;        // [d_sae, d]
  const T* bias;     // [d] or null
  const T* grad;     // [rows, d]
  T* out;            // [rows, d], or dots [rows, k]
  int64_t rows, d_sae, d;
  int k, lanes;
};

template <class I> __device__ __forceinline__ bool in_range(I index, int64_t n) { return index >= 0 && index < n; }

// out = sum_j values[j] W[indices[j]] + bias, j in order.
template <class T, class I, int V> __global__ void __launch_bounds__(kDecodeThreads) decode_rows(DecodeArgs<T, I> a) {
  using A = Acc<T>;
  constexpr int kAhead = 4;  // rows of W in flight
  const int64_t row = int64_t(blockIdx.x) * (kDecodeThreads / a.lanes) + threadIdx.x / a.lanes;
  const int64_t column = (int64_t(blockIdx.y) * a.lanes + threadIdx.x % a.lanes) * V;
  if (row >= a.rows || column >= a.d) return;
  const I* indices = a.indices + row * a.k;
  const T* values = a.values + row * a.k;
  A sum[V] = {};
  for (int start = 0; start < a.k; start += kAhead) {
    Pack<T, V> weight[kAhead] = {};
    A value[kAhead] = {};
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (start + u >= a.k) continue;
      const I latent = indices[start + u];
      const bool valid = in_range(latent, a.d_sae);
      if (valid) weight[u] = load_pack<V>(a.W + int64_t(latent) * a.d + column);
      value[u] = valid ? to_acc(values[start + u]) : A(nan_value());
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += value[u] * to_acc(weight[u].at[i]);
  }
  if (a.bias) {
    const Pack<T, V> bias = load_pack<V>(a.bias + column);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += to_acc(bias.at[i]);
  }
  store_pack<V>(a.out + row * a.d + column, sum);
}

// out[row, j] = <grad[row], W[indices[row, j]]>; NaN where the index is out of range. kDots entries of a row per team.
constexpr int kDots = 4;

template <class T, class I, int V> __global__ void __launch_bounds__(kDecodeThreads) dot_rows(DecodeArgs<T, I> a) {
  using A = Acc<T>;
  const int64_t row = int64_t(blockIdx.x) * (kDecodeThreads / a.lanes) + threadIdx.x / a.lanes;
  const int lane = threadIdx.x % a.lanes, first = blockIdx.y * kDots;
  const bool live = row < a.rows;
  int64_t latent[kDots];
  A dot[kDots] = {};
#pragma unroll
  for (int u = 0; u < kDots; ++u) latent[u] = live && first + u < a.k ? int64_t(a.indices[row * a.k + first + u]) : -1;
  for (int64_t column = lane * V; live && column < a.d; column += int64_t(a.lanes) * V) {
    const Pack<T, V> grad = load_pack<V>(a.grad + row * a.d + column);
    Pack<T, V> weight[kDots] = {};
#pragma unroll
    for (int u = 0; u < kDots; ++u)
      if (in_range(latent[u], a.d_sae)) weight[u] = load_pack<V>(a.W + latent[u] * a.d + column);
#pragma unroll
    for (int u = 0; u < kDots; ++u)
#pragma unroll
      for (int i = 0; i < V; ++i) dot[u] += to_acc(grad.at[i]) * to_acc(weight[u].at[i]);
  }
#pragma unroll
  for (int u = 0; u < kDots; ++u) {
    const A total = team_sum(dot[u], a.lanes);
    if (live && lane == 0 && first + u < a.k)
      from_acc(in_range(latent[u], a.d_sae) ? total : A(nan_value()), a.out[row * a.k + first + u]);
  }
}

}  // namespace sae_kernels
