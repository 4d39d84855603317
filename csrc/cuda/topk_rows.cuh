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
// Whether registers hold a segment, so that a warp can cut all its rows at once.
template <int Keys, bool General> constexpr bool kTogether = Keys <= 3 || (Keys <= 6 && (SK_WGMMA || !General));
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
  int cuts;     // of the block's common cuts, the last that the warp took part in
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

// The sum over the four lanes of a row.
__device__ __forceinline__ int row_sum(int x) { return team_sum(x, 4); }

// Cuts all of the warp's buffers at once, each by the four lanes of its row: to a score that a.k entries reach and,
// but for equal ones, no more than `most`. The bound rises to it; where fewer than that are there nothing is cut.
// Entry j of a row is then in segment j % 4, at j / 4. AtOnce: whether entries are read whole, where reading takes long
// and registers are free.
template <int Keys, bool General, bool AtOnce>
__device__ __forceinline__ void cut_rows(const RowArgs& a, int most, uint64_t* buffers, RowState& rows) {
  const int lane = threadIdx.x % kWarp, column = lane % 4;
  const bool is_abs = General && a.activation == kAbs;
  const float missing = is_abs ? 0.0f : -__builtin_huge_valf();
  const auto score_of = [&](float pre) { return is_abs ? fabsf(pre) : pre; };
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    uint64_t* row = buffers + (lane / 4 + 8 * half) * kRowKeys<Keys>;
    const uint64_t* segment = row + column * kSegment<Keys>;
    const int mine = ((half ? rows.next[1] : rows.next[0]) - rows.begin) / int(sizeof(uint64_t));
    const float bound = half ? rows.bound[1] : rows.bound[0];
    float pre[kSegment<Keys>], top = missing;
    uint32_t latent[kSegment<Keys>];
#pragma unroll
    for (int i = 0; i < kSegment<Keys>; ++i) {
      const uint64_t entry = segment[i];
      if constexpr (AtOnce) latent[i] = uint32_t(entry);
      pre[i] = i < mine ? __uint_as_float(uint32_t(entry >> 32)) : missing;
      top = fmaxf(top, score_of(pre[i]));
    }
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
    uint32_t low = order_of<kNone>(bound), high = order_of<kNone>(top);
    int reach = row_sum(mine);
    while (__any_sync(kAllLanes, reach > most && low < high)) {
      const uint32_t trial = low + (high - low + 1) / 2;
      const float least = score_at(trial);
      float counts[2] = {};
#pragma unroll
      for (int i = 0; i < kSegment<Keys>; ++i) counts[i % 2] += score_of(pre[i]) < least ? 0.0f : 1.0f;
      const int count = row_sum(int(counts[0] + counts[1]));
      if (reach <= most || low >= high) continue;
      if (count >= a.k) low = trial, reach = count;
      else high = trial - 1;
    }
    const float raised = low > order_of<kNone>(bound) ? score_at(low) : bound;
    int kept = 0, before = 0, all = 0;
#pragma unroll
    for (int i = 0; i < kSegment<Keys>; ++i) kept += !(score_of(pre[i]) < raised);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int other = __shfl_sync(kAllLanes, kept, lane - column + i);
      all += other;
      if (i < column) before += other;
    }
    if constexpr (!AtOnce)
#pragma unroll
      for (int i = 0; i < kSegment<Keys>; ++i) latent[i] = uint32_t(segment[i]);
    __syncwarp();  // all lanes have read theirs
#pragma unroll
    for (int i = 0; i < kSegment<Keys>; ++i) {
      if (score_of(pre[i]) < raised) continue;
      row[before % 4 * kSegment<Keys> + before / 4] = uint64_t(__float_as_uint(pre[i])) << 32 | latent[i];
      ++before;
    }
    __syncwarp();
    const int next = rows.begin + (all + 3 - column) / 4 * int(sizeof(uint64_t));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (h != half) continue;
      rows.next[h] = next;
      rows.bound[h] = raised;
    }
  }
}

// The same with buffers that are too large for registers, row by row.
template <int Keys, bool General, bool AtOnce>
__device__ __forceinline__ void cut_all_rows(const RowArgs& a, int most, uint64_t* buffers, RowState& rows) {
  if constexpr (kTogether<Keys, General>) {
    cut_rows<Keys, General, AtOnce>(a, most, buffers, rows);
  } else {
    unsigned all[2] = {kAllLanes, kAllLanes};
    cut_full_rows<Keys>(a, all, buffers, rows);
  }
}

// So that half a tile fits every segment.
template <int Keys> __device__ __forceinline__ void make_room(const RowArgs& a, uint64_t* buffers, RowState& rows) {
  const int last = rows.begin + (kSegment<Keys> - kHalfBits) * int(sizeof(uint64_t));
  unsigned full[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) full[row] = __ballot_sync(kAllLanes, rows.next[row] > last);
  cut_full_rows<Keys>(a, full, buffers, rows);
}

// x in a register: a compiler that knew where it comes from would make every number from it anew.
__device__ __forceinline__ uint32_t held(uint32_t x) {
  asm("" : "+r"(x));
  return x;
}

// In a row, bit 2 j + e stands for latent 8 j + e of the tile; in acc it is at place_of(row, bit).
__host__ __device__ constexpr int place_of(int row, int bit) { return bit / 2 * 4 + row * 2 + bit % 2; }

// Where a line of 64 limits has that of a latent: those of a lane in fours.
__host__ __device__ constexpr int limit_place(int latent) {
  const int column = latent / 2 % 4, number = latent / 8 * 2 + latent % 2;
  return number / 4 * 16 + column * 4 + number % 4;
}

// What a lane has of half a tile, bits First to First + kHalfBits - 1 of both rows.
template <int Keys, bool General, int First> struct HalfTile {
  const RowArgs& a;
  const float (&acc)[kAccs];
  const float* limits;  // of the tile
  int latent;  // of bit 0

  __device__ __forceinline__ int latent_of(int bit) const { return latent + bit / 2 * 8 + bit % 2; }
  __device__ __forceinline__ float score(int row, int bit) const {
    const float pre = acc[place_of(row, bit)];
    return General && a.activation == kAbs ? fabsf(pre) : pre;
  }
  __device__ __forceinline__ bool above_limit(int row, int bit) const {
    return !(score(row, bit) <= limits[16 * (bit / 4) + 4 * (threadIdx.x % 4) + bit % 4]);  // NaN is
  }
  __device__ __forceinline__ bool passes(const RowState& rows, int row, int bit) const {
    const bool reaches = !(score(row, bit) < rows.bound[row]);
    if constexpr (General) return reaches & above_limit(row, bit);
    else return reaches;
  }
  // What passes joins the segments, unless `full` or, for some, there is no room: then it is set, and the half has to
  // come again. Straight on, without a branch or a word to the other lanes: as long as some of a thousand accumulators
  // pass in each tile, no jump over the others pays.
  __device__ __forceinline__ void join(unsigned char* pool, RowState& rows, bool& full) const {
    constexpr int kAtOnce = 4;
    const int last = rows.begin + (kSegment<Keys> - kAtOnce) * int(sizeof(uint64_t));
    uint32_t low = held(low_half_of(latent_of(First)));
#pragma unroll
    for (int bit = First; bit < First + kHalfBits; ++bit) {
      if (bit % kAtOnce == 0) full |= max(rows.next[0], rows.next[1]) > last;
      if (bit > First) low = held(low - 2 * (latent_of(bit) - latent_of(bit - 1)));
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if (full || !passes(rows, row, bit)) continue;
        const uint64_t entry = uint64_t(__float_as_uint(acc[place_of(row, bit)])) << 32 | low;
        *reinterpret_cast<uint64_t*>(pool + rows.next[row] + row * kUpperRow<Keys>) = entry;
        rows.next[row] += sizeof(uint64_t);
      }
    }
  }
  __device__ __forceinline__ void count_passed(RowState& rows) const {
    if (!a.passed) return;
    const bool whole = (latent | (kTileLatents - 1)) < a.d_sae;
#pragma unroll
    for (int i = 0; i < 2 * kHalfBits; ++i) {
      const int row = i / kHalfBits, bit = First + i % kHalfBits;
      if (above_limit(row, bit)) rows.passed[row] += whole || latent_of(bit) < a.d_sae;
    }
  }
};

// What passes of N tiles joins the segments, as HalfTile says; of halves of tiles, `half` alone, -1 for all.
template <int Keys, bool General, int N>
__device__ __forceinline__ void join_buffers(const RowArgs& a, const float (&acc)[N][kAccs], const float* limits,
                                             int latent, unsigned char* pool, RowState& rows, int half, bool& out) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (half < 0 ? i > 0 && __any_sync(kAllLanes, out) : half / 2 != i) continue;
    bool not_lower = half % 2 > 0, not_upper = half >= 0 && half % 2 == 0;
    HalfTile<Keys, General, 0>{a, acc[i], limits, latent + i * kTileLatents}.join(pool, rows,
                                                                                 half < 0 ? out : not_lower);
    HalfTile<Keys, General, kHalfBits>{a, acc[i], limits, latent + i * kTileLatents}.join(
        pool, rows, half < 0 ? out : not_upper);
  }
}

// The best of N tiles join the buffers. latent: the lane's first one; pool: where offsets in `rows` begin. Warps of a
// block wait for each other's products: where one's buffers are almost full, it calls on all to cut theirs at one time.
template <int Keys, bool General, int N>
__device__ __forceinline__ void keep_best(const RowArgs& a, const float (&acc)[N][kAccs], const float* limits,
                                          int latent, unsigned char* pool, uint64_t* buffers, RowState& rows,
                                          Signal& cuts, bool cut = false) {
  constexpr int kAlmost = kSegment<Keys> - 4 - 2 * N;
  const int most = min(a.k + kSlack, kLargestFused<Keys>);
  const int called = cuts.read(), next[2] = {rows.next[0], rows.next[1]};
  if constexpr (General)
#pragma unroll
    for (int i = 0; i < N; ++i) {
      HalfTile<Keys, General, 0>{a, acc[i], limits, latent + i * kTileLatents}.count_passed(rows);
      HalfTile<Keys, General, kHalfBits>{a, acc[i], limits, latent + i * kTileLatents}.count_passed(rows);
    }
  cut |= called > rows.cuts;
  bool out = false;
  join_buffers<Keys, General>(a, acc, limits, latent, pool, rows, -1, out);
  if (__any_sync(kAllLanes, out | cut)) {
    if (__any_sync(kAllLanes, out)) {
      rows.next[0] = next[0], rows.next[1] = next[1];
#pragma unroll 1
      for (int half = 0; half < 2 * N; ++half) {
        make_room<Keys>(a, buffers, rows);
        join_buffers<Keys, General>(a, acc, limits, latent, pool, rows, half, out);
      }
    }
    if (__any_sync(kAllLanes, cut)) cut_all_rows<Keys, General, (N > 1)>(a, most, buffers, rows);
    rows.cuts = max(called, rows.cuts);
  }
  const int last = rows.begin + kAlmost * int(sizeof(uint64_t));
  if (max(rows.next[0], rows.next[1]) > last) cuts.raise(rows.cuts + 1);
}

}  // namespace sae_kernels
