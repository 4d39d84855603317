// A warp's 16 rows: a bound and a buffer of entries for each, and how buffers are cut back to about k entries.
#pragma once

#include "cuda/tensor_core.cuh"
#include "cuda/topk_slab.cuh"

namespace sae_kernels {

struct RowList { int32_t *at, *size; };  // numbers of rows, and how many they are

// What the kernels that feed it have in common.
struct RowArgs {
  int32_t* passed;     // [rows], or null: how many are above their limits
  void* values;        // [rows, k]
  int32_t* indices;    // [rows, k]
  int64_t rows;
  RowList only;        // the rows to take. No size: all of them; no numbers: the first ones
  const float* guess;  // [1], or null: where above 0, a row's first bound is so many times its norm
  RowList left;        // with a guess: gets the rows that have fewer than k at or above it, and they nothing
  int d_sae, k, activation;
  Out dtype;

  __device__ __forceinline__ float guessed() const { return guess ? *guess : 0; }
  __device__ __forceinline__ int64_t size() const { return only.size ? *only.size : rows; }
  // The number of the i-th row to take.
  __device__ __forceinline__ int64_t row_at(int64_t i) const { return only.at ? only.at[i] : i; }
};

constexpr int kGroupWarps = 4, kWarpRows = 16, kGroupRows = kGroupWarps * kWarpRows;
constexpr int kHalfBits = kAccs / 4;  // of half a tile, what a lane has of a row
// A row's buffer: a segment for each of the row's four lanes. A warp's lie entry by entry of all lanes side by side,
// those of its upper rows behind those of the lower ones: lanes never meet in a bank, and what all of them read is
// consecutive.
template <int Keys> constexpr int kSegment = 8 * Keys;
template <int Keys> constexpr int kRowKeys = 4 * kSegment<Keys>;
template <int Keys> constexpr int kWarpKeys = kWarpRows * kRowKeys<Keys>;
// Where entry j of row 0 to 15 stands in a warp's buffers once a cut has dealt them out: in segment j % 4, at j / 4.
template <int Keys> __device__ __forceinline__ int place_in(int row, int j) {
  const unsigned r = row, at = j;
  return int((r / 8 * kSegment<Keys> + at / 4) * kWarp + r % 8 * 4 + at % 4);
}
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
    const uint32_t order = order_of<kNone>(is_abs ? fabsf(pre) : pre);
    return latent_in(entry) < d_sae ? uint64_t(order) << 32 | uint32_t(entry) | uint32_t(is_abs && pre < 0) : 0;
  }
};

// Of both rows that a lane has a part in, l / 4 and l / 4 + 8 of the warp's. The row's four lanes know the same bound;
// each has a segment of the row's buffer to itself.
template <class Pool> struct RowState {
  float bound[2];
  uint32_t next[2];  // the place of the lane's next entry, as Pool has it; of the upper row as of the lower one's
  uint32_t begin;    // the place of its first one
  uint32_t passed;   // how many were above their limits; of the upper row in the upper half
  int cuts;          // of the block's common cuts, the last that the warp took part in

  // Entries in the lane's segment of its lower (0) or upper (1) row.
  __device__ __forceinline__ int count(int half) const {
    return int((half ? next[1] : next[0]) - begin) / int(Pool::kNext);
  }
  // A row's entries are `n`, dealt out as place_in says.
  __device__ __forceinline__ void deal(int half, int n) {
    const uint32_t to = begin + uint32_t(n + 3 - int(threadIdx.x % 4)) / 4 * Pool::kNext;
    if (half) next[1] = to;
    else next[0] = to;
  }
  // Whether a segment has more than n.
  __device__ __forceinline__ bool has_more(int half, int n) const {
    return next[half] > begin + n * Pool::kNext;
  }
  __device__ __forceinline__ bool any_has_more(int n) const {
    return max(next[0], next[1]) > begin + n * Pool::kNext;
  }
};

// The lane, for what is done seldom: a compiler that knew it would keep what follows from it in registers all the time.
__device__ __forceinline__ int lane_now() {
  int lane = threadIdx.x % kWarp;
  asm volatile("" : "+r"(lane));
  return lane;
}

// x in a register: a compiler that knew where it comes from would make every number from it anew.
__device__ __forceinline__ uint32_t held(uint32_t x) {
  asm("" : "+r"(x));
  return x;
}

constexpr uint32_t kEntryStep = kWarp * sizeof(uint64_t);  // from one of a lane's entries to the next, in bytes

// Where buffers lie, and what stands for a place in them: in shared memory bytes from its beginning, which are all that
// an address needs; in global memory how many of the lane's entries come before, which one multiplication turns into an
// address. kNext: from one place to the next. Further: entries from the place on.
struct SharedPool {
  static constexpr uint32_t kNext = kEntryStep;
  unsigned char* begin;
  __device__ __forceinline__ uint32_t place_of(const uint64_t* p) const {
    return uint32_t(reinterpret_cast<const unsigned char*>(p) - begin);
  }
  template <uint32_t Further> __device__ __forceinline__ void put(uint32_t place, uint64_t entry) const {
    *reinterpret_cast<uint64_t*>(begin + place + Further * kNext) = entry;
  }
};
struct GlobalPool {
  static constexpr uint32_t kNext = 1;
  unsigned char* begin;  // where the lane's first entry goes
  __device__ __forceinline__ uint32_t place_of(const uint64_t*) const { return 0; }
  template <uint32_t Further> __device__ __forceinline__ void put(uint32_t place, uint64_t entry) const {
    *reinterpret_cast<uint64_t*>(begin + uint64_t(place) * kEntryStep + Further * kEntryStep) = entry;
  }
};

// Empty buffers of the rows from first_row on.
template <class Pool> __device__ __forceinline__ void begin_rows(const RowArgs& a, int64_t first_row, Pool pool,
                                                                 const uint64_t* buffers,
                                                                 RowState<Pool>& rows) {
  constexpr float kInfinity = __builtin_huge_valf(), kLeast = 1.401298464e-45f, kLowest = -3.402823466e38f;
  const int lane = threadIdx.x % kWarp;
  rows.begin = pool.place_of(buffers + lane);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool live = first_row + lane / 4 + 8 * half < a.size();
    // where scores are lower still, the lowest latents fill up
    rows.bound[half] = !live ? kInfinity : a.activation == kNone ? kLowest : kLeast;
    rows.next[half] = rows.begin;
  }
}

// Raises the bounds of the warp's rows to the k-th largest of 2 N group maxima each.
template <int N, class Rows> __device__ void bound_rows(const RowArgs& a, const float (&best)[N], Rows& rows) {
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

// Cuts the buffer of a row, 0 to 15, as `cut` does; of its segment l % 4, entry 8 i + l / 4 is the i-th of the warp's
// lane l.
template <int Keys, class Rows>
__device__ __forceinline__ int cut_row(const RowArgs& a, const Rows& rows, int row, uint64_t* buffers, int most,
                                       uint32_t& bound) {
  const int lane = lane_now(), count = __shfl_sync(kAllLanes, rows.count(row / 8), row % 8 * 4 + lane % 4);
  const auto from = [&](int i) {
    return 8 * i + lane / 4 < count ? place_in<Keys>(row, i * kWarp + lane) : -1;
  };
  return cut<Keys>(buffers, from, a.k, most, KeyOf(a), [&](int j) { return place_in<Keys>(row, j); }, bound);
}

// Makes room in the buffers of those lower (0) or upper (1) rows of which any lane is set in `full`.
template <int Keys, class Rows>
__device__ __forceinline__ void cut_full_rows(const RowArgs& a, unsigned (&full)[2], uint64_t* buffers, Rows& rows) {
  const int lane = threadIdx.x % kWarp, most = min(a.k + kSlack, kLargestFused<Keys>);
  while (full[0] | full[1]) {
    const int half = full[0] ? 0 : 1, quad = (__ffs(half ? full[1] : full[0]) - 1) / 4;
    const unsigned others = ~(0xfu << 4 * quad);
    if (half) full[1] &= others;
    else full[0] &= others;
    uint32_t bound;
    const int kept = cut_row<Keys>(a, rows, quad + 8 * half, buffers, most, bound);
    if (lane / 4 != quad) continue;
    rows.deal(half, kept);
    if (kept < a.k || bound == kNanOrder) continue;  // while there are fewer than k, no latent is out
    if (half) rows.bound[1] = score_at(bound);
    else rows.bound[0] = score_at(bound);
  }
}

// The sum over the four lanes of a row.
__device__ __forceinline__ int row_sum(int x) { return team_sum(x, 4); }

// Cuts all of the warp's buffers at once, each by the four lanes of its row: to a score that a.k entries reach and,
// but for equal ones, no more than `most`. The bound rises to it; where fewer than that are there nothing is cut.
// Entry j of a row is then in segment j % 4, at j / 4; also(row, how many stay, j, entry) hears of it. AtOnce: whether
// entries are read whole, where reading takes long and registers are free.
template <int Keys, bool General, bool AtOnce, class Rows, class Also>
__device__ __forceinline__ void cut_rows(const RowArgs& a, int most, uint64_t* buffers, Rows& rows, Also also) {
  const int lane = threadIdx.x % kWarp, column = lane % 4;
  const bool is_abs = General && a.activation == kAbs;
  const float missing = is_abs ? 0.0f : -__builtin_huge_valf();
  const auto score_of = [&](float pre) { return is_abs ? fabsf(pre) : pre; };
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const int number = lane / 4 + 8 * half, mine = rows.count(half);
    const uint64_t* segment = buffers + place_in<Keys>(number, column);
    const float bound = half ? rows.bound[1] : rows.bound[0];
    float pre[kSegment<Keys>], top = missing;
    uint32_t latent[kSegment<Keys>];
#pragma unroll
    for (int i = 0; i < kSegment<Keys>; ++i) {
      const uint64_t entry = segment[i * kWarp];
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
      for (int i = 0; i < kSegment<Keys>; ++i) latent[i] = uint32_t(segment[i * kWarp]);
    __syncwarp();  // all lanes have read theirs
#pragma unroll
    for (int i = 0; i < kSegment<Keys>; ++i) {
      if (score_of(pre[i]) < raised) continue;
      const uint64_t entry = uint64_t(__float_as_uint(pre[i])) << 32 | latent[i];
      also(number, all, before, entry);
      buffers[place_in<Keys>(number, before++)] = entry;
    }
    __syncwarp();
    rows.deal(half, all);
    if (half) rows.bound[1] = raised;
    else rows.bound[0] = raised;
  }
}

template <int Keys, bool General, bool AtOnce, class Rows>
__device__ __forceinline__ void cut_rows(const RowArgs& a, int most, uint64_t* buffers, Rows& rows) {
  cut_rows<Keys, General, AtOnce>(a, most, buffers, rows, [](int, int, int, uint64_t) {});
}

// The same with buffers that are too large for registers, row by row.
template <int Keys, bool General, bool AtOnce, class Rows>
__device__ __forceinline__ void cut_all_rows(const RowArgs& a, int most, uint64_t* buffers, Rows& rows) {
  if constexpr (kTogether<Keys, General>) {
    cut_rows<Keys, General, AtOnce>(a, most, buffers, rows);
  } else {
    unsigned all[2] = {kAllLanes, kAllLanes};
    cut_full_rows<Keys>(a, all, buffers, rows);
  }
}

// So that half a tile fits every segment.
template <int Keys, class Rows>
__device__ __forceinline__ void make_room(const RowArgs& a, uint64_t* buffers, Rows& rows) {
  unsigned full[2];
#pragma unroll
  for (int row = 0; row < 2; ++row)
    full[row] = __ballot_sync(kAllLanes, rows.has_more(row, kSegment<Keys> - kHalfBits));
  cut_full_rows<Keys>(a, full, buffers, rows);
}

}  // namespace sae_kernels
