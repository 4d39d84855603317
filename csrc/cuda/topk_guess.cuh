// A guess at the first bounds of topk_fused.cuh's rows: the quotient of the k-th best score and the norm, which differs
// little from row to row, of a sample of them that was encoded before. Who has fewer than k at or above the guess is
// encoded again without, so it has no say in the result.
#pragma once

#include "cuda/topk_buffers.cuh"

namespace sae_kernels {

constexpr int kMostGuessRows = 1024, kGuessThreads = 256;

struct GuessArgs {
  const void* values;  // [rows, k]
  const float* norms;  // [n]
  RowList sample;      // n rows; no longer, once the guess is made
  float* guess;        // [1]
  int64_t rows;        // n or more
  int n, k;            // n: at most kMostGuessRows
};

// A row of each of n equal shares, at places without a period.
__global__ void __launch_bounds__(kGuessThreads) sample_rows(GuessArgs a) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t share = a.rows / a.n;
  if (i < unsigned(a.n)) a.sample.at[i] = static_cast<int32_t>(i * share + (i * 2654435769u >> 8) % share);
  if (i == 0) *a.sample.size = a.n;
}

// One warp. What all but some five in a thousand of the sample reach.
template <class T> __global__ void __launch_bounds__(kWarp) guess_from(GuessArgs a) {
  constexpr int kEach = kMostGuessRows / kWarp;
  const T* values = static_cast<const T*>(a.values);
  uint32_t order[kEach];  // of the quotients, falling; 0: none
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int i = j * kWarp + threadIdx.x;
    order[j] = i < a.n ? ~order_of<kNone>(to_acc(values[int64_t(a.sample.at[i]) * a.k + a.k - 1]) / a.norms[i]) : 0;
  }
  const int rank = 1 + a.n / 200;
  int reach;
  const uint32_t bound = warp_bound(order, rank, rank, reach);
  if (threadIdx.x == 0) *a.guess = score_at(~bound), *a.sample.size = 0;
}

}  // namespace sae_kernels
