// What a warp keeps of 16 rows whose pre-activations come tile by tile, in the accumulators of a product of 64 latents.
#pragma once

#include "cuda/topk_buffers.cuh"

namespace sae_kernels {

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
  // Of bits `first` to `first` + 3.
  __device__ __forceinline__ Pack<float, 4> limits_of(int first) const {
    return load_pack<4>(limits + 4 * first + 4 * (threadIdx.x % 4));
  }
  static __device__ __forceinline__ bool above(float score, float limit) { return !(score <= limit); }  // NaN is
  // What passes joins the segments, unless `full` or, for some, there is no room: then it is set, and the half has to
  // come again. Straight on, without a branch or a word to the other lanes: as long as some of a thousand accumulators
  // pass in each tile, no jump over the others pays. Count: whether what is above its limit is counted.
  template <bool Count, class Pool>
  __device__ __forceinline__ void join(Pool pool, RowState<Pool>& rows, bool& full) const {
    constexpr int kAtOnce = 4;
    uint32_t low = held(low_half_of(latent_of(First)));
#pragma unroll
    for (int first = First; first < First + kHalfBits; first += kAtOnce) {
      full |= rows.any_has_more(kSegment<Keys> - kAtOnce);
      Pack<float, kAtOnce> limit;
      if constexpr (General) limit = limits_of(first);
#pragma unroll
      for (int bit = first; bit < first + kAtOnce; ++bit) {
        if (bit > First) low = held(low - 2 * (latent_of(bit) - latent_of(bit - 1)));
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const float reached = score(row, bit);
          bool passes = !(full | (reached < rows.bound[row]));
          if constexpr (General) {
            const bool is_above = above(reached, limit.at[bit - first]);
            if constexpr (Count) rows.passed += is_above ? 1u << 16 * row : 0;
            passes &= is_above;
          }
          if (!passes) continue;
          const uint64_t entry = uint64_t(__float_as_uint(acc[place_of(row, bit)])) << 32 | low;
          if (row) pool.template put<kSegment<Keys>>(rows.next[1], entry);
          else pool.template put<0>(rows.next[0], entry);
          rows.next[row] += Pool::kNext;
        }
      }
    }
  }
  // What is beyond d_sae is above its limit where it is NaN: it has been counted.
  template <class Rows> __device__ __forceinline__ void uncount_beyond(Rows& rows) const {
    if ((latent | (kTileLatents - 1)) < a.d_sae) return;
#pragma unroll
    for (int bit = First; bit < First + kHalfBits; ++bit)
      for (int row = 0; row < 2; ++row) {
        const float pre = acc[place_of(row, bit)];
        rows.passed -= latent_of(bit) >= a.d_sae && pre != pre ? 1u << 16 * row : 0;
      }
  }
};

// What passes of N tiles joins the segments, as HalfTile says.
template <int Keys, bool General, int N, class Pool>
__device__ __forceinline__ void join_all(const RowArgs& a, const float (&acc)[N][kAccs], const float* limits,
                                         int latent, Pool pool, RowState<Pool>& rows, bool& full) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i > 0 && __any_sync(kAllLanes, full)) continue;
    const HalfTile<Keys, General, 0> lower{a, acc[i], limits, latent + i * kTileLatents};
    const HalfTile<Keys, General, kHalfBits> upper{a, acc[i], limits, latent + i * kTileLatents};
    lower.template join<General>(pool, rows, full);
    upper.template join<General>(pool, rows, full);
    if constexpr (General) lower.uncount_beyond(rows), upper.uncount_beyond(rows);
  }
}
// The same of half a tile, which has room.
template <int Keys, bool General, int N, class Pool>
__device__ __forceinline__ void join_half(const RowArgs& a, const float (&acc)[N][kAccs], const float* limits,
                                          int latent, Pool pool, RowState<Pool>& rows, int half) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (half / 2 != i) continue;
    bool not_lower = half % 2 > 0, not_upper = half % 2 == 0;
    HalfTile<Keys, General, 0>{a, acc[i], limits, latent + i * kTileLatents}.template join<false>(pool, rows,
                                                                                                  not_lower);
    HalfTile<Keys, General, kHalfBits>{a, acc[i], limits, latent + i * kTileLatents}.template join<false>(pool, rows,
                                                                                                          not_upper);
  }
}

// The best of N tiles join the buffers. latent: the lane's first one; pool: where the buffers lie. Warps of a
// block wait for each other's products: where one's buffers are almost full, it calls on all to cut theirs at one time.
template <int Keys, bool General, int N, class Pool>
__device__ __forceinline__ void keep_best(const RowArgs& a, const float (&acc)[N][kAccs], const float* limits,
                                          int latent, Pool pool, uint64_t* buffers, RowState<Pool>& rows,
                                          Signal& cuts, bool cut = false) {
  static_assert(N == 1 || !General, "a first try that ends early would not count");
  constexpr int kAlmost = kSegment<Keys> - 4 - 2 * N;
  const int most = min(a.k + kSlack, kLargestFused<Keys>);
  const uint32_t next[2] = {rows.next[0], rows.next[1]};
  bool full = false;
  const int early = General ? 0 : cuts.read();  // while what follows runs, where there are registers for it
  join_all<Keys, General>(a, acc, limits, latent, pool, rows, full);
  const int called = General ? cuts.read() : early;
  cut |= called > rows.cuts;
  if (__any_sync(kAllLanes, full | cut)) {
    if (__any_sync(kAllLanes, full)) {
      rows.next[0] = next[0], rows.next[1] = next[1];
#pragma unroll 1
      for (int half = 0; half < 2 * N; ++half) {
        make_room<Keys>(a, buffers, rows);
        join_half<Keys, General>(a, acc, limits, latent, pool, rows, half);
      }
    }
    if (__any_sync(kAllLanes, cut)) cut_all_rows<Keys, General, (N > 1)>(a, most, buffers, rows);
    rows.cuts = max(called, rows.cuts);
  }
  if (rows.any_has_more(kAlmost)) cuts.raise(rows.cuts + 1);
}

}  // namespace sae_kernels
