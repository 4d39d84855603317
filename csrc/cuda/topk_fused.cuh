// The k best of every row without pre-activations in memory: a block keeps 64 rows of x per warpgroup in registers and
// streams all latents past them. Each warp owns 16 rows. What reaches a row's bound goes into the row's buffer in
// shared memory, where each of the row's four lanes has a segment to itself and asks nobody; where one is full, the row
// is cut back to about k keys, and the bound rises to the k-th of them. The first bound is the k-th largest of 64 group
// maxima over a sample of the latents, which k scores reach: where products are cheap, over all of them, so that hardly
// a buffer fills. A bound is never above the k-th best score and keys are distinct, so the result is exact and no order
// of events can change it.
//
// Traffic: x once; the weights once per block, from L2, through shared memory that a warp of its own fills. Of a warp,
// 64 latents cost some 250 to 300 instructions beside the product, most of them four for each accumulator: a
// comparison, two stores and an addition that only what passes carries out.
#pragma once

#include "cuda/topk_stream.cuh"

namespace sae_kernels {

// A tile whose product runs: the lane's first latent, and the first stage that is not given back yet.
struct TileAhead { int latent, stage; };

// Tiles whose products run at once: two where there are registers for it.
template <int KC, bool General> constexpr int kTilesAhead = KC == 1 || (KC == 2 && !General) ? kProductsAhead : 1;

__device__ __forceinline__ void give_back(const FusedArgs& a, const FusedShared& shared, int stage) {
  if (threadIdx.x % kWarp == 0) shared.empty[stage < a.stages ? stage : stage - a.stages].arrive();
}

// Starts the product of the next tile.
template <class T, int KC, bool General> __device__ __forceinline__ TileAhead start_tile(
    const FusedArgs& a, const FusedShared& shared, const RowTile<T, KC>& x, Stream& stream, float (&acc)[kAccs]) {
  TileAhead ahead{stream.tile * kTileLatents + 2 * int(threadIdx.x % 4), stream.stage};
#pragma unroll
  for (int chunk = 0; chunk < KC; ++chunk) {
    shared.full[stream.stage].wait(stream.round % 2);
    multiply(acc, x, shared.tiles + stream.stage * kTileBytes, chunk);
    stream.next_stage(a);
    if (kTilesAhead<KC, General> > 1 || chunk == 0) continue;
    await_products<1>();
    __syncwarp();  // of all lanes
    give_back(a, shared, ahead.stage);
    if (++ahead.stage == a.stages) ahead.stage = 0;
  }
  stream.next_tile(a);
  return ahead;
}

// Its pre-activations, where no more than `Later` products were started after it.
template <int KC, bool General, int Later> __device__ __forceinline__ void finish_tile(
    const FusedArgs& a, const FusedShared& shared, TileAhead ahead, float (&acc)[kAccs], LineOfLane& limits) {
  constexpr int kHeld = kTilesAhead<KC, General> > 1 ? KC : 1;  // stages
  const int last = ahead.stage + kHeld - 1, stage = last < a.stages ? last : last - a.stages;
  const float* lines = shared.lines + stage * 2 * kTileLatents;
  await_products<Later>(acc);
  LineOfLane bias;
  bias.load(lines);
  if constexpr (General) limits.load(lines + kTileLatents);
#pragma unroll
  for (int i = 0; i < kAccs; ++i) acc[i] += bias.of(i / 4 * 2 + i % 2);
  __syncwarp();  // all lanes have read the lines
#pragma unroll
  for (int held = 0; held < kHeld; ++held) give_back(a, shared, ahead.stage + held);
}

// Calls use(acc, limits, the lane's first latent) for the tiles up to step `end`.
template <bool General, class T, int KC, class F> __device__ __forceinline__ void over_tiles(
    const FusedArgs& a, const FusedShared& shared, const RowTile<T, KC>& x, Stream& stream, int end, F&& use) {
  LineOfLane limits;
  while (stream.step < end) {
    if constexpr (kTilesAhead<KC, General> > 1) {
      float one[kAccs], other[kAccs];
      const TileAhead first = start_tile<T, KC, General>(a, shared, x, stream, one);
      const TileAhead second = start_tile<T, KC, General>(a, shared, x, stream, other);
      finish_tile<KC, General, KC>(a, shared, first, one, limits);
      use(one, limits, first.latent);
      finish_tile<KC, General, 0>(a, shared, second, other, limits);
      use(other, limits, second.latent);
    } else {
      float acc[kAccs];
      const TileAhead tile = start_tile<T, KC, General>(a, shared, x, stream, acc);
      finish_tile<KC, General, 0>(a, shared, tile, acc, limits);
      use(acc, limits, tile.latent);
    }
  }
}

// One warp over all latents.
template <class T, int KC, int Keys, bool General> __device__ void select_rows_of_warp(
    const FusedArgs& a, const FusedShared& shared, int64_t first_row, uint64_t* buffers) {
  const int lane = threadIdx.x % kWarp;
  const bool is_abs = General && a.activation == kAbs;
  RowTile<T, KC> x;
  x.load(static_cast<const T*>(a.x), first_row, a.rows, a.d_in);
  RowState rows{};
  begin_rows<Keys>(a, first_row, dynamic_shared(), buffers, rows);
  Stream stream(a);
  if (a.sample > 0) {
    float best[kAccs];
#pragma unroll
    for (float& b : best) b = -__builtin_huge_valf();
    over_tiles<General>(a, shared, x, stream, a.sample, [&](const float(&acc)[kAccs], const LineOfLane&, int) {
#pragma unroll
      for (int i = 0; i < kAccs; ++i) best[i] = fmaxf(best[i], is_abs ? fabsf(acc[i]) : acc[i]);
    });
    bound_rows(a, best, rows);
  }
  over_tiles<General>(a, shared, x, stream, Stream::steps(a),
                      [&](const float(&acc)[kAccs], const LineOfLane& limits, int latent) {
                        keep_best<Keys, General>(a, acc, limits, latent, dynamic_shared(), buffers, rows);
                      });
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    if (General && a.passed) {
      const int passed = team_sum(half ? rows.passed[1] : rows.passed[0], 4);
      const int64_t row = first_row + lane / 4 + 8 * half;
      if (lane % 4 == 0 && row < a.rows) a.passed[row] = passed;
    }
#pragma unroll 1
    for (int quad = 0; quad < kWarpRows / 2; ++quad) {
      const int64_t row = first_row + quad + 8 * half;
      if (row < a.rows) finish_row<Keys>(a, rows, quad, half, row, buffers + (quad + 8 * half) * kRowKeys<Keys>);
    }
  }
}

// Blocks of fused_threads(groups) threads for 64 * groups rows each: the last warpgroup only copies.
template <class T, int KC, int Keys, bool General>
__global__ void __launch_bounds__(fused_threads(kMostGroups<KC>), 1) topk_encode_rows(FusedArgs a) {
  const FusedShared shared(a.stages);
  const int warp = __shfl_sync(kAllLanes, int(threadIdx.x / kWarp), 0), workers = blockDim.x / kWarp - kGroupWarps;
  if (threadIdx.x == 0)
    for (int s = 0; s < a.stages; ++s) shared.full[s].init(kFillers), shared.empty[s].init(workers);
  show_barriers();
  __syncthreads();
  if (warp >= workers) {
    give_registers<32>();
    if (warp == workers) stream_weights<KC, General>(a, shared);
  } else {
    take_registers<160>();
    select_rows_of_warp<T, KC, Keys, General>(
        a, shared, (int64_t(blockIdx.x) * workers + warp) * kWarpRows,
        shared.keys + warp * kWarpRows * kRowKeys<Keys>);
  }
}

}  // namespace sae_kernels
