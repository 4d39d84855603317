// The k best of every row without pre-activations in memory: a block keeps 64 rows of x per warpgroup in registers and
// streams all latents past them. Each warp owns 16 rows. What reaches a row's bound goes into the row's buffer in
// shared memory, where each of the row's four lanes has a segment to itself and asks nobody; where one is almost full,
// all rows of the block are cut back to about k keys, and their bounds rise to the k-th of them. The first bound is the
// k-th largest of 64 group maxima over a sample of the latents, which k scores reach: where products are cheap, over
// all of them, so that hardly a buffer fills. A bound is never above the k-th best score and keys are distinct, so the
// result is exact and no order of events can change it.
//
// Traffic: x once; the weights once per block, from L2, through shared memory that a warp of its own fills. Of a warp,
// 64 latents cost some 250 instructions, most of them four or five for each accumulator: a comparison, and a move, a
// store and an addition that only what passes carries out.
#pragma once

#include "cuda/topk_stream.cuh"

namespace sae_kernels {

// A tile whose product runs: the lane's first latent; the first stage that is not given back yet; the last.
struct TileAhead { int latent, stage, last; };

// Tiles whose products run at once: two where there are registers for it.
template <int KC, bool General> constexpr int kTilesAhead = KC == 1 || (KC == 2 && !General) ? kProductsAhead : 1;

__device__ __forceinline__ void give_back(const FusedArgs& a, const FusedShared& shared, int stage) {
  if (threadIdx.x % kWarp == 0) shared.empty[stage < a.stages ? stage : stage - a.stages].arrive();
}

// Starts the product of the next tile.
template <class T, int KC, bool General> __device__ __forceinline__ TileAhead start_tile(
    const FusedArgs& a, const FusedShared& shared, const RowTile<T, KC>& x, Stream& stream, float (&acc)[kAccs]) {
  TileAhead ahead{stream.tile * kTileLatents + 2 * int(threadIdx.x % 4), stream.stage, 0};
#pragma unroll
  for (int chunk = 0; chunk < KC; ++chunk) {
    shared.full[stream.stage].wait(stream.round % 2);
    const Line biases{shared.lines_of(stream.stage), shared.zeros};
    multiply(acc, x, shared.tiles + stream.stage * kTileBytes, chunk, biases);
    ahead.last = stream.stage;
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

// Calls use(acc, the tile's limits, the lane's first latent) once the product is there, where no more than `Later`
// others were started after it, and gives its stages back: those without limits before.
template <int KC, bool General, int Later, class F> __device__ __forceinline__ void finish_tile(
    const FusedArgs& a, const FusedShared& shared, TileAhead tile, float (&acc)[1][kAccs], F&& use) {
  constexpr int kHeld = kTilesAhead<KC, General> > 1 ? KC : 1;  // stages
  const auto return_stages = [&] {
    __syncwarp();  // of all lanes
#pragma unroll
    for (int held = 0; held < kHeld; ++held) give_back(a, shared, tile.stage + held);
  };
  await_products<Later>(acc[0]);
  if constexpr (!General) return_stages();
  use(acc, shared.limits(tile.last), tile.latent);
  if constexpr (General) return_stages();
}

// Calls use for the tiles up to step `end`.
template <bool General, class T, int KC, class F> __device__ __forceinline__ void over_tiles(
    const FusedArgs& a, const FusedShared& shared, const RowTile<T, KC>& x, Stream& stream, int end, F&& use) {
  while (stream.step < end) {
    if constexpr (kTilesAhead<KC, General> > 1) {
      float one[1][kAccs], other[1][kAccs];
      const TileAhead first = start_tile<T, KC, General>(a, shared, x, stream, one[0]);
      const TileAhead second = start_tile<T, KC, General>(a, shared, x, stream, other[0]);
      finish_tile<KC, General, KC>(a, shared, first, one, use);
      finish_tile<KC, General, 0>(a, shared, second, other, use);
    } else {
      float acc[1][kAccs];
      const TileAhead tile = start_tile<T, KC, General>(a, shared, x, stream, acc[0]);
      finish_tile<KC, General, 0>(a, shared, tile, acc, use);
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
  RowState<SharedPool> rows{};
  const SharedPool pool{dynamic_shared()};
  begin_rows(a, first_row, pool, buffers, rows);
  Stream stream(a);
  if (a.sample > 0) {
    float best[kAccs];
#pragma unroll
    for (float& b : best) b = -__builtin_huge_valf();
    over_tiles<General>(a, shared, x, stream, a.sample, [&](const float(&acc)[1][kAccs], const float*, int) {
#pragma unroll
      for (int i = 0; i < kAccs; ++i) best[i] = fmaxf(best[i], is_abs ? fabsf(acc[0][i]) : acc[0][i]);
    });
    bound_rows(a, best, rows);
  }
  over_tiles<General>(a, shared, x, stream, Stream::steps(a),
                      [&](const float(&acc)[1][kAccs], const float* limits, int latent) {
                        keep_best<Keys, General>(a, acc, limits, latent, pool, buffers, rows, *shared.cuts);
                      });
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    if (General && a.passed) {
      const int passed = row_sum(half ? rows.passed >> 16 : rows.passed & 0xffff);
      const int64_t row = first_row + lane / 4 + 8 * half;
      if (lane % 4 == 0 && row < a.rows) a.passed[row] = passed;
    }
  }
  finish_rows<Keys, General>(a, rows, first_row, buffers);
}

// Blocks of fused_threads(groups) threads for 64 * groups rows each: the last warpgroup only copies.
template <class T, int KC, int Keys, bool General>
__global__ void __launch_bounds__(fused_threads(kMostGroups<KC, Keys, General>), 1) topk_encode_rows(FusedArgs a) {
  if (a.needed && *a.needed == 0) return;
  FusedShared shared(a.stages);
  const int warp = __shfl_sync(kAllLanes, int(threadIdx.x / kWarp), 0), workers = blockDim.x / kWarp - kGroupWarps;
  shared.begin(a.stages, workers);
  __syncthreads();
  if (warp >= workers) {
    give_registers<32>();
    if (warp == workers) stream_weights<KC, General>(a, shared);
  } else {
    take_registers<kRowRegisters<kMostGroups<KC, Keys, General>>>();
    select_rows_of_warp<T, KC, Keys, General>(
        a, shared, (int64_t(blockIdx.x) * workers + warp) * kWarpRows,
        shared.keys + warp * kWarpKeys<Keys>);
  }
}

}  // namespace sae_kernels
