// Sums per latent, without atomics and in one fixed order: entries come sorted by latent (stable), cut into chunks of
// fixed length. A team adds up the runs of equal latents in its chunk, in order; a run that lies whole in a chunk is
// finished, the two that may cross its ends go to slots, which a second kernel adds in the order of the chunks. So a
// latent that fires on every row occupies many teams, and the work of a team does not depend on the data.
// Reads entries x d elements of `rows`, scattered, and writes d_sae x d.
#pragma once

#include "cuda/sparse_decode.cuh"

namespace sae_kernels {

template <class T, class I> struct SumArgs {
  const T* rows;         // [N, d]
  const T* weights;      // [N, k]
  const T* W;            // [d_sae, d] or null: dots wanted, which takes rows of one slice
  const I* latents;      // [entries], ascending
  const int64_t* order;  // [entries]: where in [N, k] each of them stands
  T* dots;               // [N, k]: <rows[n], W[latent]>; NaN where the latent is out of range
  T* sums;               // [d_sae, d], zero where a latent has no entries
  T* totals;             // [d_sae] or null: sums of the weights
  Acc<T>* slots;         // [2 chunks, d]
  Acc<T>* slot_totals;   // [2 chunks]
  int64_t entries, chunk, d_sae, d;
  int k, lanes;
};

// 32-bit division is several times as fast.
__device__ __forceinline__ int64_t row_of(int64_t position, int k) {
  return position <= 0xffffffff ? uint32_t(position) / uint32_t(k) : position / k;
}

template <class T, int V> struct Run {
  Acc<T> sum[V], total;
  __device__ __forceinline__ void clear() {
    total = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] = 0;
  }
};

// Where a finished run goes: its latent's row, or the slot of the end that it crosses, 0 the beginning, 1 the end.
template <class T, class I, int V>
__device__ __forceinline__ void write_run(const SumArgs<T, I>& a, const Run<T, V>& run, I latent, int64_t number,
                                          bool from_before, bool goes_on, int64_t column) {
  if (!in_range(latent, a.d_sae)) return;
  const int64_t slot = 2 * number + (from_before ? 0 : 1);
  if (column < a.d) {
    if (from_before || goes_on) {
#pragma unroll
      for (int i = 0; i < V; ++i) a.slots[slot * a.d + column + i] = run.sum[i];
    } else {
      store_pack<V>(a.sums + int64_t(latent) * a.d + column, run.sum);
    }
  }
  if (a.totals && column == 0) {
    if (from_before || goes_on) a.slot_totals[slot] = run.total;
    else from_acc(run.total, a.totals[latent]);
  }
}

template <class T, class I, int V> __global__ void __launch_bounds__(kDecodeThreads, 4) sum_runs(SumArgs<T, I> a) {
  using A = Acc<T>;
  constexpr int kAhead = 4;  // rows in flight
  const int64_t number = int64_t(blockIdx.x) * (kDecodeThreads / a.lanes) + threadIdx.x / a.lanes;
  const int64_t column = (int64_t(blockIdx.y) * a.lanes + threadIdx.x % a.lanes) * V;
  const int64_t begin = min(number * a.chunk, a.entries), end = min(begin + a.chunk, a.entries);
  const bool inside = column < a.d, has_work = begin < end;
  I current = has_work ? a.latents[begin] : I(0);
  bool from_before = has_work && begin > 0 && a.latents[begin - 1] == current;
  Run<T, V> run;
  run.clear();
  Pack<T, V> w = {};
  if (a.W && has_work && inside && in_range(current, a.d_sae)) w = load_pack<V>(a.W + int64_t(current) * a.d + column);
  // as many turns for every team of a warp: they meet in the dots
  for (int64_t step = 0; step < a.chunk; step += kAhead) {
    I latent[kAhead];
    int64_t position[kAhead];
    A weight[kAhead];
    Pack<T, V> row[kAhead] = {};
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t at = begin + step + u;
      const bool on = at < end;
      latent[u] = on ? a.latents[at] : current;
      position[u] = on ? a.order[at] : -1;
      weight[u] = on ? to_acc(a.weights[position[u]]) : A(0);
      if (on && inside) row[u] = load_pack<V>(a.rows + row_of(position[u], a.k) * a.d + column);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (position[u] >= 0 && latent[u] != current) {
        write_run<T, I, V>(a, run, current, number, from_before, false, column);
        run.clear();
        current = latent[u];
        from_before = false;
        if (a.W && inside && in_range(current, a.d_sae)) w = load_pack<V>(a.W + int64_t(current) * a.d + column);
      }
      run.total += weight[u];
      A dot = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        run.sum[i] += weight[u] * to_acc(row[u].at[i]);
        dot += to_acc(row[u].at[i]) * to_acc(w.at[i]);
      }
      if (!a.W) continue;
      dot = team_sum(dot, a.lanes);
      if (position[u] >= 0 && column == 0)
        from_acc(in_range(current, a.d_sae) ? dot : A(nan_value()), a.dots[position[u]]);
    }
  }
  if (!has_work) return;
  const bool goes_on = end < a.entries && a.latents[end] == current;
  write_run<T, I, V>(a, run, current, number, from_before, goes_on, column);
}

// The chunk in which a run begins that goes on in the next one adds that run's slots up.
template <class T, class I, int V> __global__ void __launch_bounds__(kDecodeThreads) join_runs(SumArgs<T, I> a) {
  const int64_t number = int64_t(blockIdx.x) * (kDecodeThreads / a.lanes) + threadIdx.x / a.lanes;
  const int64_t column = (int64_t(blockIdx.y) * a.lanes + threadIdx.x % a.lanes) * V;
  const int64_t begin = number * a.chunk;
  int64_t end = begin + a.chunk;
  if (end >= a.entries || column >= a.d) return;  // the last run of the last chunk goes nowhere
  const I latent = a.latents[end - 1];
  const bool from_before = begin > 0 && a.latents[begin - 1] == latent;
  if (!in_range(latent, a.d_sae) || a.latents[end] != latent || from_before) return;
  Run<T, V> run;
  run.clear();
  for (int64_t slot = 2 * number + 1;;) {
#pragma unroll
    for (int i = 0; i < V; ++i) run.sum[i] += a.slots[slot * a.d + column + i];
    if (a.totals && column == 0) run.total += a.slot_totals[slot];
    if (end >= a.entries || a.latents[end] != latent) break;
    slot = 2 * (end / a.chunk);
    end += a.chunk;
  }
  store_pack<V>(a.sums + int64_t(latent) * a.d + column, run.sum);
  if (a.totals && column == 0) from_acc(run.total, a.totals[latent]);
}

}  // namespace sae_kernels
