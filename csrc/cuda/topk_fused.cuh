// The k best of every row without pre-activations in memory: a block keeps 64 rows of x per warpgroup in registers and
// streams all latents past them. Each warp owns 16 rows. What reaches a row's bound goes into the row's buffer in
// shared memory; a full buffer is cut back to about k keys, and the bound rises to the k-th of them. The first bound is
// the k-th largest of 64 group maxima over a sample of the latents, which k scores reach. A bound is never above the
// k-th best score and keys are distinct, so the result is exact and no order of events can change it.
//
// Traffic: x once; the weights once per block, from L2, through shared memory that a warp of its own fills.
#pragma once

#include "cuda/dynamic_shared.cuh"
#include "cuda/tensor_core.cuh"
#include "cuda/topk_select.cuh"

namespace sae_kernels {

struct FusedArgs {
  const void* x;    // [rows, d_in], d_in a multiple of 8
  const void* W;    // [d_sae, d_in], d_sae a multiple of 64
  const float* bias;       // [d_sae] or null
  const float* threshold;  // as in SelectArgs
  int32_t* passed;         // [rows], or null: of those above their threshold
  void* values;            // [rows, k]
  int32_t* indices;        // [rows, k]
  int64_t rows;
  int d_in, d_sae, k, threshold_step, activation;
  int stages;  // tiles of weights in shared memory
  int sample;  // tiles that the first bound is taken from; 0: none
  Out dtype;
};

constexpr int kGroupWarps = 4, kWarpRows = 16, kGroupRows = kGroupWarps * kWarpRows, kMostGroups = SK_WGMMA ? 3 : 2;
constexpr int kHalf = kAccs / 2, kHalfLatents = kTileLatents / 2, kSlack = 8;
constexpr int fused_threads(int groups) { return (groups + 1) * kGroupWarps * kWarp; }
// A row's buffer and one key more, so that rows begin at different banks.
template <int Keys> constexpr int kRowKeys = Keys * kWarp + 1;
// The largest k that leaves room for half a tile beside k and the slack of a cut.
template <int Keys> constexpr int kLargestFused = Keys * kWarp - kHalfLatents;
template <int Keys> constexpr int64_t fused_bytes(int groups, int stages) {
  return 1024 + int64_t(stages) * (kTileBytes + 2 * sizeof(Barrier)) + groups * kGroupRows * kRowKeys<Keys> * 8;
}

// From the block's dynamic shared memory.
struct FusedShared {
  unsigned char* tiles;
  Barrier *full, *empty;
  uint64_t* keys;

  __device__ __forceinline__ explicit FusedShared(int stages) {
    unsigned char* at = dynamic_shared();
    tiles = at + (1024 - reinterpret_cast<uintptr_t>(at) % 1024) % 1024;
    full = reinterpret_cast<Barrier*>(tiles + stages * kTileBytes);
    empty = full + stages;
    keys = reinterpret_cast<uint64_t*>(empty + stages);
  }
};

// The order in which a block takes the tiles: the sample, evenly spread, then all; blocks begin at different ones.
__device__ __forceinline__ int tile_at(const FusedArgs& a, int step) {
  const int tiles = a.d_sae / kTileLatents;
  const int tile = step < a.sample ? step * (tiles / a.sample) : step - a.sample;
  return (tile + int(blockIdx.x % unsigned(tiles)) * 5) % tiles;
}
__device__ __forceinline__ int tile_steps(const FusedArgs& a) { return a.sample + a.d_sae / kTileLatents; }

// One warp fills the stages, chunk by chunk of 64 elements of each latent of a tile.
template <class T, int KC> __device__ void stream_weights(const FusedArgs& a, const FusedShared& shared) {
  const int lane = threadIdx.x % kWarp, column = lane % 8;
  const T* W = static_cast<const T*>(a.W);
  int stage = 0, round = 0;
  for (int step = 0, steps = tile_steps(a); step < steps; ++step) {
    const int64_t latent = int64_t(tile_at(a, step)) * kTileLatents + lane / 8;
#pragma unroll 1
    for (int chunk = 0; chunk < KC; ++chunk) {
      if (round > 0) shared.empty[stage].wait((round - 1) % 2);
      const int d = chunk * kTileDepth + 8 * column;
      const bool inside = d < a.d_in;
      const T* from = W + latent * a.d_in + (inside ? d : 0);
      unsigned char* tile = shared.tiles + stage * kTileBytes;
#pragma unroll
      for (int i = 0; i < kTileLatents / 4; ++i)
        copy_16(tile + tile_place(lane / 8 + 4 * i, column), from + int64_t(4 * i) * a.d_in, inside);
      shared.full[stage].arrive_after_copies();
      if (++stage == a.stages) stage = 0, ++round;
    }
  }
}

// A kept latent as it stands in a buffer: its pre-activation, then the lower half of its key, without the sign.
__device__ __forceinline__ uint64_t entry_of(float pre, int latent) {
  return uint64_t(__float_as_uint(pre)) << 32 | (0x7fffffffu - uint32_t(latent)) << 1;
}
__device__ __forceinline__ uint64_t key_in(uint64_t entry, bool is_abs) {
  const float pre = __uint_as_float(uint32_t(entry >> 32));
  const uint32_t order = is_abs ? order_of<kAbs>(pre) : order_of<kNone>(pre);
  return uint64_t(order) << 32 | uint32_t(entry) | uint32_t(is_abs && pre < 0);
}

// The largest bound, as far as it matters, that `least` of the warp's numbers reach; 0 none of them counts for.
// `reach` is how many reach it. Stops when that is at most `most`.
template <int N> __device__ __forceinline__ uint32_t warp_bound(const uint32_t (&of)[N], int least, int most, int& reach) {
  uint32_t low = 1, high = 0;
  int count = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    high = max(high, of[i]);
    count += __popc(__ballot_sync(kAllLanes, of[i] > 0));
  }
  high = __reduce_max_sync(kAllLanes, high);
  reach = count;
  while (reach > most && low < high) {
    const uint32_t middle = low + (high - low) / 2 + 1 - ((high - low) % 2 == 0);
    const uint32_t trial = max(middle, low + 1);
    count = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) count += __popc(__ballot_sync(kAllLanes, of[i] >= trial));
    if (count >= least) low = trial, reach = count;
    else high = trial - 1;
  }
  return low;
}

// Cuts a row's buffer of n > most entries, at least `least` of them the best, to at most `most`. Returns their number;
// `bound` is the order of the score that all of them reach. The whole warp calls.
template <int Keys> __device__ int cut(uint64_t* buffer, int n, int least, int most, bool is_abs, uint32_t& bound) {
  const int lane = threadIdx.x % kWarp;
  uint64_t entry[Keys];
  uint32_t order[Keys], low[Keys];
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Keys; ++i) {
    const int at = i * kWarp + lane;
    entry[i] = at < n ? buffer[at] : 0;
    const uint64_t key = key_in(entry[i], is_abs);
    order[i] = at < n ? order_in(key) : 0;
    low[i] = uint32_t(key);
  }
  int reach;
  bound = warp_bound(order, least, most, reach);
  uint32_t last = 0;
  if (reach > most) {  // equal scores: the lowest latents of those at the bound
    int above = 0;
#pragma unroll
    for (int i = 0; i < Keys; ++i) {
      above += __popc(__ballot_sync(kAllLanes, order[i] > bound));
      low[i] = order[i] == bound ? low[i] : 0;
    }
    last = warp_bound(low, least - above, most - above, reach);
#pragma unroll
    for (int i = 0; i < Keys; ++i) order[i] = order[i] == bound && low[i] < last ? 0 : order[i];
  }
  int kept = 0;
#pragma unroll
  for (int i = 0; i < Keys; ++i) {
    const unsigned votes = __ballot_sync(kAllLanes, order[i] >= bound);
    if (order[i] >= bound) buffer[kept + __popc(votes & ((1u << lane) - 1))] = entry[i];
    kept += __popc(votes);
  }
  __syncwarp();
  return kept;
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

// Half a tile: what reaches the bounds joins the buffers. pre [32] of both rows, from `latent` of this lane on.
template <int Keys, bool General> __device__ __forceinline__ void keep_best(
    const FusedArgs& a, const float* pre, const float* limit, int latent, uint64_t* buffers, RowState& rows) {
  const int lane = threadIdx.x % kWarp;
  const bool is_abs = General && a.activation == kAbs, limited = General && a.threshold;
  const auto passes = [&](int i) {
    const float score = is_abs ? fabsf(pre[i]) : pre[i];
    const bool reaches = !(score < rows.bound[i / 2 % 2]);
    return General ? reaches && !(limited && score <= limit[i / 4 * 2 + i % 2]) : reaches;
  };
  int ahead, total;
  for (;;) {
    int mine = 0;  // of the lower row, and of the upper one 16 bits higher
#pragma unroll
    for (int i = 0; i < kHalf; ++i) mine += passes(i) ? (i / 2 % 2 ? 0x10000 : 1) : 0;
    if (!__any_sync(kAllLanes, mine)) return;
    ahead = mine;
    for (int step = 1; step < 4; step *= 2) {
      const int from = __shfl_sync(kAllLanes, ahead, max(lane - step, 0));
      ahead += lane % 4 >= step ? from : 0;
    }
    total = __shfl_sync(kAllLanes, ahead, lane | 3);
    ahead -= mine;
    unsigned full[2];
    full[0] = __ballot_sync(kAllLanes, rows.count[0] + (total & 0xffff) > Keys * kWarp);
    full[1] = __ballot_sync(kAllLanes, rows.count[1] + (total >> 16) > Keys * kWarp);
    if (!(full[0] | full[1])) break;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      while (full[half]) {
        const int quad = (__ffs(full[half]) - 1) / 4;
        full[half] &= ~(0xfu << 4 * quad);
        const int n = __shfl_sync(kAllLanes, rows.count[half], 4 * quad);
        const int most = min(a.k + kSlack, kLargestFused<Keys>);
        uint32_t bound;
        const int kept = cut<Keys>(buffers + (quad + 8 * half) * kRowKeys<Keys>, n, a.k, most, is_abs, bound);
        if (lane / 4 == quad) {
          rows.count[half] = kept;
          rows.bound[half] = bound == kNanOrder ? rows.bound[half] : score_at(bound);
        }
      }
  }
  uint64_t* at[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int shift = 16 * half;
    at[half] = buffers + (lane / 4 + 8 * half) * kRowKeys<Keys> + rows.count[half] + (ahead >> shift & 0xffff);
    rows.count[half] += total >> shift & 0xffff;
  }
#pragma unroll
  for (int i = 0; i < kHalf; ++i)
    if (passes(i)) *at[i / 2 % 2]++ = entry_of(pre[i], latent + i / 4 * 8 + i % 2);
}

// Descending, one key per lane.
__device__ __forceinline__ uint64_t sort_warp(uint64_t key) {
  const int lane = threadIdx.x % kWarp;
  for (int size = 2; size <= kWarp; size *= 2)
    for (int stride = size / 2; stride > 0; stride /= 2) {
      const uint64_t other = __shfl_xor_sync(kAllLanes, key, stride);
      const bool keep_larger = ((lane & size) == 0) == ((lane & stride) == 0);
      key = (key > other) == keep_larger ? key : other;
    }
  return key;
}

struct WarpTeam { static constexpr int kTeam = kWarp; };

// The end of one row: exactly its k best keys, in order. Where fewer than k passed, the lowest latents that did not
// fill up, at the lowest score.
template <int Keys> __device__ void finish_row(const FusedArgs& a, int64_t row, uint64_t* buffer, int n) {
  const int lane = threadIdx.x % kWarp;
  const bool is_abs = a.activation == kAbs;
  if (n > a.k) {
    uint32_t bound;
    n = cut<Keys>(buffer, n, a.k, a.k, is_abs, bound);
  }
  __syncwarp();
  uint64_t key = lane < n ? key_in(buffer[lane], is_abs) : 0;
  if (n < a.k || a.k > kWarp) {
    for (int at = lane; at < n; at += kWarp) buffer[at] = key_in(buffer[at], is_abs);
    __syncwarp();
    for (int first = 0, taken = n; n < a.k; first += kWarp) {
      bool free = true;
      for (int at = 0; at < taken; ++at) free &= latent_in(buffer[at]) != first + lane;
      const unsigned votes = __ballot_sync(kAllLanes, free);
      const int at = n + __popc(votes & ((1u << lane) - 1));
      const uint32_t floor = a.activation == kNone ? kFloor<kNone> : kFloor<kRelu>;
      if (free && at < a.k) buffer[at] = key_of(floor, first + lane, false);
      n = min(a.k, n + __popc(votes));
    }
    __syncwarp();
    if (a.k > kWarp) sort_descending<WarpTeam>(buffer, n, n, lane);
    key = lane < n ? buffer[lane] : 0;
  }
  if (a.k <= kWarp) key = sort_warp(key);
  for (int j = lane; j < a.k; j += kWarp)
    write_code(a.values, a.indices, a.dtype, row * a.k + j, a.k <= kWarp ? key : buffer[j], is_abs);
}

// Where a warp stands in the stream of tiles.
struct Stream {
  int step = 0, stage = 0, round = 0;
};

// Of the latents that a lane has in a tile.
struct Columns {
  float bias[kHalf], limit[kHalf];

  __device__ __forceinline__ void read(const FusedArgs& a, int latent, bool limits) {
#pragma unroll
    for (int j = 0; j < kHalf / 2; ++j) {
      if (a.bias) {
        const Pack<float, 2> pair = load_pack<2>(a.bias + latent + 8 * j);
        bias[2 * j] = pair.at[0], bias[2 * j + 1] = pair.at[1];
      }
      if (limits) {
        const float* at = a.threshold + int64_t(latent + 8 * j) * a.threshold_step;
        limit[2 * j] = at[0], limit[2 * j + 1] = at[a.threshold_step];
      }
    }
  }
};

// The next tile's pre-activations of the warp's rows; returns the first latent of this lane in it.
template <class T, int KC, bool Limits>
__device__ __forceinline__ int next_tile(const FusedArgs& a, const FusedShared& shared, const RowTile<T, KC>& x,
                                         Stream& stream, float (&acc)[kAccs], Columns& columns) {
  const int latent = tile_at(a, stream.step) * kTileLatents + 2 * (threadIdx.x % 4);
  const bool limits = Limits && a.threshold;
  int began = stream.stage;
  begin_product(acc);
#pragma unroll
  for (int chunk = 0; chunk < KC; ++chunk) {
    shared.full[stream.stage].wait(stream.round % 2);
    multiply(acc, x, shared.tiles + stream.stage * kTileBytes, chunk);
    if (++stream.stage == a.stages) stream.stage = 0, ++stream.round;
  }
  if (KC < 4) columns.read(a, latent, limits);  // while the product runs, where there are registers to
  end_product(acc);
  __syncwarp();  // all lanes have read the tile
  for (int chunk = 0; chunk < KC; ++chunk) {
    if (threadIdx.x % kWarp == 0) shared.empty[began].arrive();
    if (++began == a.stages) began = 0;
  }
  if (KC == 4) columns.read(a, latent, limits);
  if (a.bias) {
#pragma unroll
    for (int i = 0; i < kAccs; ++i) acc[i] += columns.bias[i / 4 * 2 + i % 2];
  }
  ++stream.step;
  return latent;
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
  Columns columns;
  Stream stream;
  if (a.sample > 0) {
    float best[kAccs];
#pragma unroll
    for (float& b : best) b = -kInfinity;
    while (stream.step < a.sample) {
      next_tile<T, KC, false>(a, shared, x, stream, acc, columns);
#pragma unroll
      for (int i = 0; i < kAccs; ++i) best[i] = fmaxf(best[i], is_abs ? fabsf(acc[i]) : acc[i]);
    }
    bound_rows(a, best, rows);
  }
  for (const int steps = tile_steps(a); stream.step < steps;) {
    const int latent = next_tile<T, KC, General>(a, shared, x, stream, acc, columns);
    if (General && a.threshold) {
#pragma unroll
      for (int i = 0; i < kAccs; ++i)
        rows.passed[i / 2 % 2] += !((is_abs ? fabsf(acc[i]) : acc[i]) <= columns.limit[i / 4 * 2 + i % 2]);
    }
    keep_best<Keys, General>(a, acc, columns.limit, latent, buffers, rows);
    keep_best<Keys, General>(a, acc + kHalf, columns.limit + kHalf / 2, latent + kHalfLatents, buffers, rows);
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
__global__ void __launch_bounds__(fused_threads(kMostGroups), 1) topk_encode_rows(FusedArgs a) {
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
