// What a warp keeps of 16 rows whose pre-activations come tile by tile, in the accumulators of a product of 64 latents:
// a bound and a buffer of entries for each row, and what becomes of them in the end.
#pragma once

#include "cuda/tensor_core.cuh"
#include "cuda/topk_slab.cuh"

namespace sae_kernels {

// What the kernels that feed it have in common.
struct RowArgs {
  int32_t* passed;  // [rows], or null: how many are above their limits
  void* values;     // [rows, k]
  int32_t* indices; // [rows, k]
  int64_t rows;
  int d_sae, k, activation;
  Out dtype;
};

constexpr int kGroupWarps = 4, kWarpRows = 16, kGroupRows = kGroupWarps * kWarpRows;
constexpr int kHalfBits = kAccs / 4;  // of half a tile, what a lane has of a row
// A row's buffer: a segment for each of the row's four lanes. One key more lets rows begin at different banks.
template <int Keys> constexpr int kSegment = 8 * Keys;
template <int Keys> constexpr int kRowKeys = 4 * kSegment<Keys> + 1;
// What a cut leaves at most, so that half a tile fits each segment; also the largest k.
template <int Keys> constexpr int kLargestFused = 4 * (kSegment<Keys> - kHalfBits);

// The key of an entry; 0 for what is beyond d_sae, where only infinite or NaN rows bring anything.
struct KeyOf {
  bool is_abs;
  int d_sae;
  __device__ __forceinline__ explicit KeyOf(const RowArgs& a) : is_abs(a.activation == kAbs), d_sae(a.d_sae) {}
  __device__ __forceinline__ uint64_t operator()(uint64_t entry) const {
    const float pre = __uint_as_float(uint32_t(entry >> 32));
    const uint32_t order = is_abs ? order_of<kAbs>(pre) : order_of<kNone>(pre);
    return latent_in(entry) < d_sae ? uint64_t(order) << 32 | uint32_t(entry) | uint32_t(is_abs && pre < 0) : 0;
  }
};

// Of both rows that a lane has a part in, l / 4 and l / 4 + 8 of the warp's. The row's four lanes know the same bound;
// each has a segment of the row's buffer to itself.
struct RowState {
  float bound[2];
  int next[2];  // where in the pool of buffers the lane's next key goes, of the upper row less kUpperRow
  int begin;    // where the lower row's segment begins
  int passed[2];
};
template <int Keys> constexpr int kUpperRow = 8 * kRowKeys<Keys> * int(sizeof(uint64_t));

// Empty buffers of the rows from first_row on.
template <int Keys> __device__ __forceinline__ void begin_rows(const RowArgs& a, int64_t first_row,
                                                               const unsigned char* pool, const uint64_t* buffers,
                                                               RowState& rows) {
  constexpr float kInfinity = __builtin_huge_valf(), kLeast = 1.401298464e-45f, kLowest = -3.402823466e38f;
  const int lane = threadIdx.x % kWarp;
  const uint64_t* segment = buffers + lane / 4 * kRowKeys<Keys> + lane % 4 * kSegment<Keys>;
  rows.begin = int(reinterpret_cast<const unsigned char*>(segment) - pool);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool live = first_row + lane / 4 + 8 * half < a.rows;
    // where scores are lower still, the lowest latents fill up
    rows.bound[half] = !live ? kInfinity : a.activation == kNone ? kLowest : kLeast;
    rows.next[half] = rows.begin;
  }
}

// Raises the bounds of the warp's rows to the k-th largest of 2 N group maxima each.
template <int N> __device__ void bound_rows(const RowArgs& a, const float (&best)[N], RowState& rows) {
  uint32_t order[N];
#pragma unroll
  for (int i = 0; i < N; ++i) order[i] = order_of<kNone>(best[i]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t bound = 0;
    for (uint32_t bit = kSign; bit > 0x4000; bit /= 2) {  // 8 bits of the mantissa are enough
      const uint32_t trial = bound | bit;
      int reach = 0;
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (i / 2 % 2 == half) reach += order[i] >= trial;
      reach += __shfl_xor_sync(kAllLanes, reach, 1);
      reach += __shfl_xor_sync(kAllLanes, reach, 2);
      if (reach >= a.k) bound = trial;
    }
    const float score = bound > kSign ? score_at(bound) : rows.bound[half];  // NaN: no bound
    rows.bound[half] = score > rows.bound[half] ? score : rows.bound[half];
  }
}

// Cuts a row's segments, of that quad's lanes: entry 8 i + l / 4 of segment l % 4 is the i-th of the warp's lane l.
template <int Keys, class Read, class To>
__device__ __forceinline__ int cut_row(const RowState& rows, int quad, int half, uint64_t* buffer, int least, int most,
                                       Read read, To to, uint32_t& bound) {
  const int lane = threadIdx.x % kWarp;
  const int mine = ((half ? rows.next[1] : rows.next[0]) - rows.begin) / int(sizeof(uint64_t));
  const int count = __shfl_sync(kAllLanes, mine, 4 * quad + lane % 4);
  const auto from = [&](int i) {
    const int at = 8 * i + lane / 4;
    return at < count ? lane % 4 * kSegment<Keys> + at : -1;
  };
  return cut<Keys>(buffer, from, least, most, read, to, bound);
}

// Makes room in the buffers of those lower (0) or upper (1) rows of which any lane is set in `full`.
template <int Keys> __device__ __forceinline__ void cut_full_rows(const RowArgs& a, unsigned (&full)[2],
                                                                  uint64_t* buffers, RowState& rows) {
  const int lane = threadIdx.x % kWarp, most = min(a.k + kSlack, kLargestFused<Keys>);
  while (full[0] | full[1]) {
    const int half = full[0] ? 0 : 1, quad = (__ffs(half ? full[1] : full[0]) - 1) / 4;
    const unsigned others = ~(0xfu << 4 * quad);
    if (half) full[1] &= others;
    else full[0] &= others;
    uint32_t bound;
    const int kept = cut_row<Keys>(rows, quad, half, buffers + (quad + 8 * half) * kRowKeys<Keys>, a.k, most,
                                   KeyOf(a), [](int j) { return j % 4 * kSegment<Keys> + j / 4; }, bound);
    if (lane / 4 != quad) continue;
    const int next = rows.begin + (kept + 3 - lane % 4) / 4 * int(sizeof(uint64_t));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (h != half) continue;
      rows.next[h] = next;
      if (bound != kNanOrder) rows.bound[h] = score_at(bound);
    }
  }
}

// x in a register: a compiler that knew where it comes from would make every number from it anew.
__device__ __forceinline__ uint32_t held(uint32_t x) {
  asm("" : "+r"(x));
  return x;
}

// In a row, bit 2 j + e stands for latent 8 j + e of the tile; in acc it is at place_of(row, bit).
__host__ __device__ constexpr int place_of(int row, int bit) { return bit / 2 * 4 + row * 2 + bit % 2; }

// A lane's numbers of a line of 64 latents: two for each eight.
struct LineOfLane {
  Pack<float, 4> at[kAccs / 8];
  __device__ __forceinline__ void load(const float* line) {
#pragma unroll
    for (int i = 0; i < kAccs / 8; ++i) at[i] = load_pack<4>(line + 16 * i + 4 * (threadIdx.x % 4));
  }
  __device__ __forceinline__ float of(int bit) const { return at[bit / 4].at[bit % 4]; }
};

// What a lane has of half a tile, bits First to First + kHalfBits - 1 of both rows.
template <int Keys, bool General, int First> struct HalfTile {
  const RowArgs& a;
  const float (&acc)[kAccs];
  const LineOfLane& limits;
  int latent;  // of bit 0

  __device__ __forceinline__ int latent_of(int bit) const { return latent + bit / 2 * 8 + bit % 2; }
  __device__ __forceinline__ float score(int row, int bit) const {
    const float pre = acc[place_of(row, bit)];
    return General && a.activation == kAbs ? fabsf(pre) : pre;
  }
  __device__ __forceinline__ bool above_limit(int row, int bit) const {
    return !(score(row, bit) <= limits.of(bit));  // NaN is
  }
  __device__ __forceinline__ bool passes(const RowState& rows, int row, int bit) const {
    const bool reaches = !(score(row, bit) < rows.bound[row]);
    if constexpr (General) return reaches & above_limit(row, bit);
    else return reaches;
  }
  // Whether it fits the segments; else full[row] has the lanes where it does not.
  __device__ __forceinline__ bool fits(const RowState& rows, unsigned (&full)[2]) const {
    constexpr int kBytes = sizeof(uint64_t);
    const int end = rows.begin + kSegment<Keys> * kBytes;
    if (!__any_sync(kAllLanes, max(rows.next[0], rows.next[1]) > end - kHalfBits * kBytes)) return true;
    int after[2] = {rows.next[0], rows.next[1]};
#pragma unroll
    for (int i = 0; i < 2 * kHalfBits; ++i)
      if (passes(rows, i / kHalfBits, First + i % kHalfBits)) after[i / kHalfBits] += kBytes;
#pragma unroll
    for (int row = 0; row < 2; ++row) full[row] = __ballot_sync(kAllLanes, after[row] > end);
    return !(full[0] | full[1]);
  }
  // What passes joins the segments. Straight on, without a branch or a word to the other lanes: as long as some of a
  // thousand accumulators pass in each tile, no jump over the others pays.
  __device__ __forceinline__ void join(unsigned char* pool, RowState& rows) const {
    uint32_t low = held(low_half_of(latent_of(First)));
#pragma unroll
    for (int bit = First; bit < First + kHalfBits; ++bit) {
      if (bit > First) low = held(low - 2 * (latent_of(bit) - latent_of(bit - 1)));
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if (!passes(rows, row, bit)) continue;
        auto* at = reinterpret_cast<uint32_t*>(pool + rows.next[row] + row * kUpperRow<Keys>);
        at[0] = low;  // two stores: for one, registers would have to be brought together
        at[1] = __float_as_uint(acc[place_of(row, bit)]);
        rows.next[row] += sizeof(uint64_t);
      }
    }
    if constexpr (!General) return;
    if (!a.passed) return;
    const bool whole = (latent | (kTileLatents - 1)) < a.d_sae;
#pragma unroll
    for (int i = 0; i < 2 * kHalfBits; ++i) {
      const int row = i / kHalfBits, bit = First + i % kHalfBits;
      if (above_limit(row, bit)) rows.passed[row] += whole || latent_of(bit) < a.d_sae;
    }
  }
};

// The best of a tile join the buffers, half by half. latent: the lane's first one; pool: where offsets in `rows` begin.
template <int Keys, bool General>
__device__ __forceinline__ void keep_best(const RowArgs& a, const float (&acc)[kAccs], const LineOfLane& limits,
                                          int latent, unsigned char* pool, uint64_t* buffers, RowState& rows) {
  for (int done = 0;;) {
    unsigned full[2] = {};
    if (done == 0) {
      const HalfTile<Keys, General, 0> half{a, acc, limits, latent};
      if (half.fits(rows, full)) half.join(pool, rows), done = 1;
    }
    if (done == 1) {
      const HalfTile<Keys, General, kHalfBits> half{a, acc, limits, latent};
      if (half.fits(rows, full)) return half.join(pool, rows);
    }
    cut_full_rows<Keys>(a, full, buffers, rows);
  }
}

struct WarpTeam { static constexpr int kTeam = kWarp; };

// Where fewer latents than k passed: the lowest of the others fill up, at the lowest score, as far as `first` to `end`
// has any. buffer: n keys; returns how many they are then.
__device__ __forceinline__ int fill_up(const RowArgs& a, uint64_t* buffer, int n, int first, int end) {
  const int lane = threadIdx.x % kWarp, taken = n;
  const uint32_t floor = a.activation == kNone ? kFloor<kNone> : kFloor<kRelu>;
  for (; n < a.k && first < end; first += kWarp) {
    bool free = first + lane < end;
    for (int at = 0; at < taken; ++at) free &= latent_in(buffer[at]) != first + lane;
    const unsigned votes = __ballot_sync(kAllLanes, free);
    const int at = n + __popc(votes & ((1u << lane) - 1));
    if (free && at < a.k) buffer[at] = key_of(floor, first + lane, false);
    n = min(a.k, n + __popc(votes));
  }
  __syncwarp();
  return n;
}

// The k best keys of a row, in any order, at the beginning of its buffer; returns how many there are in latents `first`
// to `end`, fewer than k only where these are fewer.
template <int Keys> __device__ __forceinline__ int best_keys(const RowArgs& a, const RowState& rows, int quad, int half,
                                                             uint64_t* buffer, int first, int end) {
  const KeyOf read(a);
  uint32_t bound;
  const int n = cut_row<Keys>(rows, quad, half, buffer, a.k, a.k, read, [](int j) { return j; }, bound);
  for (int at = threadIdx.x % kWarp; at < n; at += kWarp) buffer[at] = read(buffer[at]);
  __syncwarp();
  return fill_up(a, buffer, n, first, end);
}

// The end of one row: its k best keys, in order.
template <int Keys> __device__ void finish_row(const RowArgs& a, const RowState& rows, int quad, int half,
                                               int64_t row, uint64_t* buffer) {
  const int lane = threadIdx.x % kWarp;
  const bool is_abs = a.activation == kAbs;
  best_keys<Keys>(a, rows, quad, half, buffer, 0, a.d_sae);
  if (a.k <= kWarp) {
    uint64_t key[1] = {lane < a.k ? buffer[lane] : 0};
    sort_warp(key);
    if (lane < a.k) write_code(a.values, a.indices, a.dtype, row * a.k + lane, key[0], is_abs);
    return;
  }
  sort_descending<WarpTeam>(buffer, a.k, a.k, lane);
  for (int j = lane; j < a.k; j += kWarp) write_code(a.values, a.indices, a.dtype, row * a.k + j, buffer[j], is_abs);
}

}  // namespace sae_kernels
