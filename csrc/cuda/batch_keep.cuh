// The last step of batch_topk_encode: of every row's candidates, the best of the whole batch. The order of the last one
// kept is found digit by digit, from counts of the candidates that share the digits before it: three passes over them,
// and no sort. Integers alone are added, so the order of atomics changes nothing. Bound by those passes' reads.
#pragma once

#include "cuda/topk_keys.cuh"

namespace sae_kernels {

constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits, kOrderBits = 32;
constexpr int kKeepThreads = 256, kKeepRows = kKeepThreads / kWarp;  // a warp per row

struct KeepArgs {
  const float* values;        // [rows, m], the candidates of a row first, best first
  const int32_t* counts;      // [rows]: how many they are, of which m are there at most
  unsigned long long* digits; // [kDigits] of candidates with a digit; zeros between the passes
  int64_t* state;             // [2]: digits found so far; how many are left to keep among those that share them
  int32_t *above, *equal;     // [rows]: candidates above the last one kept, and those of its score
  const int64_t* before;      // [rows]: `equal` added up over the rows before and this one
  float *kept, *threshold;    // [rows, m], [1]
  int32_t* kept_counts;       // [rows]
  int64_t rows, m;
  int shift, magnitude;       // shift: of the pass's digit
};

__device__ __forceinline__ int candidates_of(const KeepArgs& a, int64_t row) {
  return int(min(int64_t(a.counts[row]), a.m));
}
__device__ __forceinline__ uint32_t order_at(const KeepArgs& a, int64_t row, int64_t j) {
  const float value = a.values[row * a.m + j];
  return a.magnitude ? order_of<kAbs>(value) : order_of<kNone>(value);
}

// Counts the digits at `shift` of the candidates whose higher ones are as in the state.
__global__ void __launch_bounds__(kKeepThreads) count_digits(KeepArgs a) {
  __shared__ unsigned counted[kDigits];
  const int lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x; i < kDigits; i += kKeepThreads) counted[i] = 0;
  __syncthreads();
  const int above = a.shift + kDigitBits;  // of the first pass: 32 or more
  const uint32_t found = uint32_t(a.state[0]);
  for (int64_t row = int64_t(blockIdx.x) * kKeepRows + threadIdx.x / kWarp; row < a.rows;
       row += int64_t(gridDim.x) * kKeepRows) {
    const int n = candidates_of(a, row);
    for (int j = lane; j < n; j += kWarp) {
      const uint32_t order = order_at(a, row, j);
      if (above < kOrderBits && order >> above != found >> above) continue;
      atomicAdd(counted + (order >> a.shift) % kDigits, 1u);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kDigits; i += kKeepThreads)
    if (counted[i] > 0) atomicAdd(a.digits + i, static_cast<unsigned long long>(counted[i]));
}

// One block: the digit of the last candidate kept.
__global__ void __launch_bounds__(kKeepThreads) choose_digit(KeepArgs a) {
  constexpr int kEach = kDigits / kKeepThreads;  // digits of a thread; the first thread has the highest
  __shared__ int64_t sums[kKeepThreads];
  const int thread = threadIdx.x, highest = kDigits - 1 - thread * kEach;
  int64_t mine = 0;
  for (int i = 0; i < kEach; ++i) mine += int64_t(a.digits[highest - i]);
  sums[thread] = mine;
  for (int step = 1; step < kKeepThreads; step *= 2) {
    __syncthreads();
    const int64_t more = thread >= step ? sums[thread - step] : 0;
    __syncthreads();
    sums[thread] += more;
  }
  __syncthreads();
  const int64_t left = min(a.state[1], sums[kKeepThreads - 1]);  // all, where there are fewer candidates
  int64_t ahead = sums[thread] - mine;
  __syncthreads();
  for (int i = 0; i < kEach; ++i) {
    const int64_t here = int64_t(a.digits[highest - i]);
    if (ahead < left && left <= ahead + here) {
      a.state[0] |= int64_t(highest - i) << a.shift;
      a.state[1] = left - ahead;
    }
    ahead += here;
    a.digits[highest - i] = 0;
  }
  if (thread == 0 && left == 0) a.state[1] = 0;
}

__global__ void __launch_bounds__(kKeepThreads) split_rows(KeepArgs a) {
  const int64_t row = int64_t(blockIdx.x) * kKeepRows + threadIdx.x / kWarp;
  if (row >= a.rows) return;
  const uint32_t last = uint32_t(a.state[0]);
  const int lane = threadIdx.x % kWarp, n = candidates_of(a, row);
  int above = 0, equal = 0;
  for (int j = lane; j < n; j += kWarp) {
    const uint32_t order = order_at(a, row, j);
    above += order > last;
    equal += order == last;
  }
  above = __reduce_add_sync(kAllLanes, above);
  equal = __reduce_add_sync(kAllLanes, equal);
  if (lane == 0) a.above[row] = above, a.equal[row] = equal;
}

// Equal scores stand by the lower row, then by the place in it.
__global__ void __launch_bounds__(kKeepThreads) write_kept(KeepArgs a) {
  const int64_t row = int64_t(blockIdx.x) * kKeepRows + threadIdx.x / kWarp;
  if (row >= a.rows) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t left = a.state[1], equal = a.equal[row], free = left - (a.before[row] - equal);
  const int64_t kept = a.above[row] + max(int64_t(0), min(free, equal));
  for (int64_t j = lane; j < a.m; j += kWarp) a.kept[row * a.m + j] = j < kept ? a.values[row * a.m + j] : 0.0f;
  if (lane == 0) a.kept_counts[row] = int32_t(kept);
  if (lane == 0 && row == 0) *a.threshold = left > 0 ? score_at(uint32_t(a.state[0])) : 0.0f;
}

}  // namespace sae_kernels
