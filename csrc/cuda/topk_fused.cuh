// The k best of every row without pre-activations in memory: a block keeps 64 rows of x per warpgroup in registers and
// streams all latents past them. Each warp owns 16 rows. What reaches a row's bound goes into the row's buffer in
// shared memory; a full buffer is cut back to about k keys, and the bound rises to the k-th of them. The first bound is
// the k-th largest of 64 group maxima over a sample of the latents, which k scores reach: where products are cheap, over
// all of them, so that hardly a buffer fills. A bound is never above the k-th best score and keys are distinct, so the
// result is exact and no order of events can change it.
//
// Traffic: x once; the weights once per block, from L2, through shared memory that a warp of its own fills.
#pragma once

#include "cuda/topk_select.cuh"
#include "cuda/topk_stream.cuh"

namespace sae_kernels {

// A kept latent as it stands in a buffer: its pre-activation, then the lower half of its key, without the sign.
__device__ __forceinline__ uint64_t entry_of(float pre, int latent) {
  return uint64_t(__float_as_uint(pre)) << 32 | (0x7fffffffu - uint32_t(latent)) << 1;
}
__device__ __forceinline__ uint64_t key_in(uint64_t entry, bool is_abs) {
  const float pre = __uint_as_float(uint32_t(entry >> 32));
  const uint32_t order = is_abs ? order_of<kAbs>(pre) : order_of<kNone>(pre);
  return uint64_t(order) << 32 | uint32_t(entry) | uint32_t(is_abs && pre < 0);
}

__device__ __forceinline__ float score_at(uint32_t order) { return value_in(uint64_t(order) << 32, false); }

// Of both rows that a lane has a part in, l / 4 and l / 4 + 8 of the warp's: all four lanes know the same.
struct RowState {
  float bound[2];
  int count[2], passed[2];
};

// Rises the bounds of the warp's rows to the k-th largest of 64 group maxima each.
__device__ void bound_rows(const FusedArgs& a, float (&best)[kAccs], RowState& rows) {
  uint32_t order[kAccs];
#pragma unroll
  for (int i = 0; i < kAccs; ++i) order[i] = order_of<kNone>(best[i]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t bound = 0;
    for (uint32_t bit = kSign; bit > 0x4000; bit /= 2) {  // 8 bits of the mantissa are enough
      const uint32_t trial = bound | bit;
      int reach = 0;
#pragma unroll
      for (int i = 0; i < kAccs; ++i)
        if (i / 2 % 2 == half) reach += order[i] >= trial;
      reach += __shfl_xor_sync(kAllLanes, reach, 1);
      reach += __shfl_xor_sync(kAllLanes, reach, 2);
      if (reach >= a.k) bound = trial;
    }
    const float score = bound > kSign ? score_at(bound) : rows.bound[half];  // NaN: no bound
    rows.bound[half] = score > rows.bound[half] ? score : rows.bound[half];
  }
}

// Makes room in the buffers of those lower (Half 0) or upper rows whose four lanes are set in `full`.
template <int Keys, int Half>
__device__ __forceinline__ void cut_full_rows(const FusedArgs& a, unsigned full, uint64_t* buffers, RowState& rows) {
  const int lane = threadIdx.x % kWarp, most = min(a.k + kSlack, kLargestFused<Keys>);
  const bool is_abs = a.activation == kAbs;
  while (full) {
    const int quad = (__ffs(full) - 1) / 4;
    full &= ~(0xfu << 4 * quad);
    const int n = __shfl_sync(kAllLanes, rows.count[Half], 4 * quad);
    uint32_t bound;
    const int kept = cut<Keys>(buffers + (quad + 8 * Half) * kRowKeys<Keys>, n, a.k, most,
                               [&](uint64_t entry) { return key_in(entry, is_abs); }, bound);
    if (lane / 4 == quad) {
      rows.count[Half] = kept;
      rows.bound[Half] = bound == kNanOrder ? rows.bound[Half] : score_at(bound);
    }
  }
}

// Bit 2 j + e of a row's mask stands for latent 8 j + e of the tile; in acc it is at place_of(row, bit).
__host__ __device__ constexpr int place_of(int row, int bit) { return bit / 2 * 4 + row * 2 + bit % 2; }
// acc[place_of(Row, bit)] for bit in First to First + Width - 1. A tree of masks: an index, a choice or a loop would
// send the registers through local memory.
template <int Row, int First, int Width>
__device__ __forceinline__ uint32_t chosen(const float (&acc)[kAccs], int bit) {
  if constexpr (Width == 1) {
    return __float_as_uint(acc[place_of(Row, First)]);
  } else {
    const uint32_t upper = bit & (Width / 2) ? 0xffffffffu : 0;
    return (chosen<Row, First, Width / 2>(acc, bit) & ~upper) |
           (chosen<Row, First + Width / 2, Width / 2>(acc, bit) & upper);
  }
}

// Of a lane's bits First to First + Bits - 1 in both rows, those whose scores reach the bounds and pass the limits.
template <bool General, int First, int Bits> __device__ __forceinline__ void mark_reaching(
    const FusedArgs& a, const float (&acc)[kAccs], const float* limit, const RowState& rows, unsigned (&mask)[2]) {
  const bool is_abs = General && a.activation == kAbs, limited = General && a.threshold;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    unsigned part[2] = {};  // two chains are shorter than one
#pragma unroll
    for (int bit = First; bit < First + Bits; ++bit) {
      const float pre = acc[place_of(row, bit)], score = is_abs ? fabsf(pre) : pre;
      bool passes = !(score < rows.bound[row]);
      if (limited) passes &= !(score <= limit[bit - First]);
      part[bit % 2] |= passes ? 1u << bit : 0;
    }
    mask[row] = part[0] | part[1];
  }
}

// What reaches the bounds joins the buffers, of a whole tile at once or, where that might not fit, of a half.
template <int Keys, bool General, int First, int Bits> __device__ __forceinline__ void keep_best(
    const FusedArgs& a, const float (&acc)[kAccs], const float* limit, int latent, uint64_t* buffers, RowState& rows) {
  const int lane = threadIdx.x % kWarp;
  unsigned mask[2];
  int ahead, total;  // of the lower row, and of the upper one 16 bits higher
  for (;;) {
    mark_reaching<General, First, Bits>(a, acc, limit, rows, mask);
    if (!__any_sync(kAllLanes, mask[0] | mask[1])) return;
    const int mine = __popc(mask[0]) | __popc(mask[1]) << 16;
    ahead = mine;
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const int from = __shfl_sync(kAllLanes, ahead, max(lane - step, 0));
      ahead += lane % 4 >= step ? from : 0;
    }
    total = __shfl_sync(kAllLanes, ahead, lane | 3);
    ahead -= mine;
    const bool fits[2] = {rows.count[0] + (total & 0xffff) <= Keys * kWarp, rows.count[1] + (total >> 16) <= Keys * kWarp};
    if (!__any_sync(kAllLanes, !(fits[0] && fits[1]))) break;
    if constexpr (Bits > kHalfBits) {
      keep_best<Keys, General, 0, kHalfBits>(a, acc, limit, latent, buffers, rows);
      keep_best<Keys, General, kHalfBits, kHalfBits>(a, acc, limit, latent, buffers, rows);
      return;
    } else {
      const unsigned full[2] = {__ballot_sync(kAllLanes, !fits[0]), __ballot_sync(kAllLanes, !fits[1])};
      cut_full_rows<Keys, 0>(a, full[0], buffers, rows);
      cut_full_rows<Keys, 1>(a, full[1], buffers, rows);
    }
  }
  int place[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    place[row] = (lane / 4 + 8 * row) * kRowKeys<Keys> + rows.count[row] + (ahead >> 16 * row & 0xffff);
    rows.count[row] += total >> 16 * row & 0xffff;
  }
  while (mask[0] | mask[1]) {
    const int bit[2] = {__ffs(mask[0]) - 1, __ffs(mask[1]) - 1};
    const uint32_t pre[2] = {chosen<0, First, Bits>(acc, bit[0]), chosen<1, First, Bits>(acc, bit[1])};
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (mask[row]) buffers[place[row]++] = entry_of(__uint_as_float(pre[row]), latent + bit[row] / 2 * 8 + bit[row] % 2);
      mask[row] &= mask[row] - 1;
    }
  }
}

struct WarpTeam { static constexpr int kTeam = kWarp; };

// Where fewer latents than k passed: the lowest of the others fill up, at the lowest score. buffer: n keys.
__device__ __forceinline__ void fill_up(const FusedArgs& a, uint64_t* buffer, int n) {
  const int lane = threadIdx.x % kWarp, taken = n;
  const uint32_t floor = a.activation == kNone ? kFloor<kNone> : kFloor<kRelu>;
  for (int first = 0; n < a.k; first += kWarp) {
    bool free = true;
    for (int at = 0; at < taken; ++at) free &= latent_in(buffer[at]) != first + lane;
    const unsigned votes = __ballot_sync(kAllLanes, free);
    const int at = n + __popc(votes & ((1u << lane) - 1));
    if (free && at < a.k) buffer[at] = key_of(floor, first + lane, false);
    n = min(a.k, n + __popc(votes));
  }
  __syncwarp();
}

// The end of one row: its k best keys, in order.
template <int Keys> __device__ void finish_row(const FusedArgs& a, int64_t row, uint64_t* buffer, int n) {
  const int lane = threadIdx.x % kWarp;
  const bool is_abs = a.activation == kAbs;
  const auto read = [&](uint64_t entry) { return key_in(entry, is_abs); };
  __syncwarp();
  if (n >= a.k && a.k <= kWarp && Keys == 3) {
    uint64_t key[Keys];
#pragma unroll
    for (int i = 0; i < Keys; ++i) key[i] = lane + i * kWarp < n ? read(buffer[lane + i * kWarp]) : 0;
    sort_warp(key);
#pragma unroll
    for (int i = 1; i < Keys; ++i) key[0] = merge_warp(key[0], key[i]);
    if (lane < a.k) write_code(a.values, a.indices, a.dtype, row * a.k + lane, key[0], is_abs);
    return;
  }
  uint32_t bound;
  if (n > a.k) n = cut<Keys>(buffer, n, a.k, a.k, read, bound);
  for (int at = lane; at < n; at += kWarp) buffer[at] = read(buffer[at]);
  __syncwarp();
  if (n < a.k) fill_up(a, buffer, n);
  sort_descending<WarpTeam>(buffer, a.k, a.k, lane);
  for (int j = lane; j < a.k; j += kWarp) write_code(a.values, a.indices, a.dtype, row * a.k + j, buffer[j], is_abs);
}

// The next tile's pre-activations of the warp's rows; returns the first latent of this lane in it.
template <class T, int KC>
__device__ __forceinline__ int next_tile(const FusedArgs& a, const FusedShared& shared, const RowTile<T, KC>& x,
                                         Stream& stream, float (&acc)[kAccs]) {
  const int column = 2 * (threadIdx.x % 4), latent = stream.tile * kTileLatents + column;
  int began = stream.stage;
  begin_product(acc);
#pragma unroll
  for (int chunk = 0; chunk < KC; ++chunk) {
    shared.full[stream.stage].wait(stream.round % 2);
    multiply(acc, x, shared.tiles + stream.stage * kTileBytes, chunk);
    stream.next_stage(a);
  }
  const float* from = shared.bias + began * kTileLatents + column;
  Pack<float, 2> bias[kTileLatents / 8];
#pragma unroll
  for (int j = 0; j < kTileLatents / 8; ++j) bias[j] = load_pack<2>(from + 8 * j);
  stream.next_tile(a);
  end_product(acc);
#pragma unroll
  for (int i = 0; i < kAccs; ++i) acc[i] += bias[i / 4].at[i % 2];
  __syncwarp();  // all lanes have read the tile
  for (int chunk = 0; chunk < KC; ++chunk) {
    if (threadIdx.x % kWarp == 0) shared.empty[began].arrive();
    if (++began == a.stages) began = 0;
  }
  return latent;
}

// Half a tile with thresholds or magnitudes: counts what is above its threshold, and keeps the best of that.
template <int Keys, int First> __device__ __forceinline__ void keep_passing(
    const FusedArgs& a, const float (&acc)[kAccs], int latent, uint64_t* buffers, RowState& rows) {
  float limit[kHalfBits];
#pragma unroll
  for (int i = 0; i < kHalfBits; ++i) {
    const int bit = First + i;
    limit[i] = a.threshold ? a.threshold[int64_t(latent + bit / 2 * 8 + bit % 2) * a.threshold_step] : 0.0f;
  }
  if (a.threshold) {
#pragma unroll
    for (int i = 0; i < 2 * kHalfBits; ++i) {
      const float pre = acc[place_of(i / kHalfBits, First + i % kHalfBits)];
      rows.passed[i / kHalfBits] += !((a.activation == kAbs ? fabsf(pre) : pre) <= limit[i % kHalfBits]);
    }
  }
  keep_best<Keys, true, First, kHalfBits>(a, acc, limit, latent, buffers, rows);
}

// One warp over all latents.
template <class T, int KC, int Keys, bool General> __device__ void select_rows_of_warp(
    const FusedArgs& a, const FusedShared& shared, int64_t first_row, uint64_t* buffers) {
  constexpr float kInfinity = __builtin_huge_valf(), kLeast = 1.401298464e-45f;
  const int lane = threadIdx.x % kWarp;
  const bool is_abs = General && a.activation == kAbs;
  RowTile<T, KC> x;
  x.load(static_cast<const T*>(a.x), first_row, a.rows, a.d_in);
  RowState rows{};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool live = first_row + lane / 4 + 8 * half < a.rows;
    rows.bound[half] = !live ? kInfinity : a.activation == kNone ? -kInfinity : kLeast;
  }
  float acc[kAccs] = {};
  Stream stream(a);
  if (a.sample > 0) {
    float best[kAccs];
#pragma unroll
    for (float& b : best) b = -kInfinity;
    while (stream.step < a.sample) {
      next_tile(a, shared, x, stream, acc);
#pragma unroll
      for (int i = 0; i < kAccs; ++i) best[i] = fmaxf(best[i], is_abs ? fabsf(acc[i]) : acc[i]);
    }
    bound_rows(a, best, rows);
  }
  for (const int steps = Stream::steps(a); stream.step < steps;) {
    const int latent = next_tile(a, shared, x, stream, acc);
    if constexpr (General) {
      keep_passing<Keys, 0>(a, acc, latent, buffers, rows);
      keep_passing<Keys, kHalfBits>(a, acc, latent, buffers, rows);
    } else {
      keep_best<Keys, false, 0, 2 * kHalfBits>(a, acc, nullptr, latent, buffers, rows);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (General && a.passed) {
      const int passed = team_sum(rows.passed[half], 4);
      const int64_t row = first_row + lane / 4 + 8 * half;
      if (lane % 4 == 0 && row < a.rows) a.passed[row] = passed;
    }
#pragma unroll 1
    for (int quad = 0; quad < kWarpRows / 2; ++quad) {
      const int64_t row = first_row + quad + 8 * half;
      const int n = __shfl_sync(kAllLanes, rows.count[half], 4 * quad);
      if (row < a.rows) finish_row<Keys>(a, row, buffers + (quad + 8 * half) * kRowKeys<Keys>, n);
    }
  }
}

// Blocks of fused_threads(groups) threads for 64 * groups rows each: the last warpgroup only copies.
template <class T, int KC, int Keys, bool General>
__global__ void __launch_bounds__(fused_threads(kMostGroups<KC>), 1) topk_encode_rows(FusedArgs a) {
  const FusedShared shared(a.stages);
  const int warp = __shfl_sync(kAllLanes, int(threadIdx.x / kWarp), 0), workers = blockDim.x / kWarp - kGroupWarps;
  if (threadIdx.x == 0)
    for (int s = 0; s < a.stages; ++s) shared.full[s].init(kWarp), shared.empty[s].init(workers);
  __syncthreads();
  if (warp >= workers) {
    give_registers();
    if (warp == workers) stream_weights<T, KC>(a, shared);
  } else {
    take_registers();
    select_rows_of_warp<T, KC, Keys, General>(
        a, shared, (int64_t(blockIdx.x) * workers + warp) * kWarpRows,
        shared.keys + warp * kWarpRows * kRowKeys<Keys>);
  }
}

}  // namespace sae_kernels
