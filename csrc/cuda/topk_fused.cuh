// The k best of every row without pre-activations in memory: a block keeps 64 rows of x per warpgroup in registers and
// streams all latents past them. Each warp owns 16 rows. What reaches a row's bound goes into the row's buffer in
// shared memory, where each of the row's four lanes has a segment to itself and asks nobody; where one is almost full,
// all rows of the block are cut back to about k keys, and their bounds rise to the k-th of them. Of many rows the first
// bound is a guess (topk_guess.cuh), which k scores have to reach, else the row comes again; of few it is the k-th
// largest of 64 group maxima over a sample of the latents, which k scores reach: where products are cheap, over all of
// them, so that hardly a buffer fills. So no bound that stands is above the k-th best score, and keys are distinct: the
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

// Raises the bounds of the warp's rows to what their norms let expect, but for those that have none.
template <class T, int KC, class Rows> __device__ __forceinline__ void guess_bounds(
    const FusedArgs& a, const RowTile<T, KC>& x, int64_t first_row, Rows& rows) {
  const int lane = threadIdx.x % kWarp;
  const float guess = a.guessed();
  if (!a.norms && !(guess > 0)) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float norm = sqrtf(team_sum(x.squares(half), 4)), bound = guess * norm;
    const int64_t row = first_row + lane / 4 + 8 * half;
    if (a.norms && lane % 4 == 0 && row < a.size()) a.norms[row] = norm;
    if (guess > 0 && bound > rows.bound[half] && bound < __builtin_huge_valf()) rows.bound[half] = bound;
  }
}

// One warp over all latents, with its rows of a lot.
template <class T, int KC, int Keys, bool General> __device__ void select_rows_of_warp(
    const FusedArgs& a, const FusedShared& shared, Stream& stream, int lot, uint64_t* buffers) {
  const int lane = threadIdx.x % kWarp;
  int64_t first_row = first_row_of(lot);
  const bool is_abs = General && a.activation == kAbs;
  int64_t numbers[2];
  for (int half = 0; half < 2; ++half) {
    const int64_t at = first_row + lane / 4 + 8 * half;
    numbers[half] = at < a.size() ? a.row_at(at) : -1;
  }
  RowTile<T, KC> x;
  x.load(static_cast<const T*>(a.x), numbers, a.d_in);
  RowState<SharedPool> rows{};
  rows.cuts = shared.cuts->read();
  const SharedPool pool{dynamic_shared()};
  begin_rows(a, first_row, pool, buffers, rows);
  if constexpr (!General) guess_bounds(a, x, first_row, rows);
  stream.step = 0;
  if (stream.sample > 0) {
    float best[kAccs];
#pragma unroll
    for (float& b : best) b = -__builtin_huge_valf();
    over_tiles<General>(a, shared, x, stream, stream.sample, [&](const float(&acc)[1][kAccs], const float*, int) {
#pragma unroll
      for (int i = 0; i < kAccs; ++i) best[i] = fmaxf(best[i], is_abs ? fabsf(acc[0][i]) : acc[0][i]);
    });
    bound_rows(a, best, rows);
  }
  over_tiles<General>(a, shared, x, stream, stream.steps(a),
                      [&](const float(&acc)[1][kAccs], const float* limits, int latent) {
                        keep_best<Keys, General>(a, acc, limits, latent, pool, buffers, rows, *shared.cuts);
                      });
  first_row = first_row_of(held(lot));
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    if (General && a.passed) {
      const int passed = row_sum(half ? rows.passed >> 16 : rows.passed & 0xffff);
      const int64_t at = first_row + lane / 4 + 8 * half;
      if (lane % 4 == 0 && at < a.size()) a.passed[a.row_at(at)] = passed;
    }
  }
  finish_rows<Keys, General>(a, rows, first_row, buffers);
  __syncwarp();  // all lanes have read the buffers
}

// Blocks of fused_threads(groups) threads, which take 64 * groups rows at a time: the last warpgroup only copies.
template <class T, int KC, int Keys, bool General>
__global__ void __launch_bounds__(fused_threads(kMostGroups<KC, Keys, General>), 1) topk_encode_rows(FusedArgs a) {
  FusedShared shared(a.stages);
  const int warp = known_to_all(threadIdx.x / kWarp), workers = blockDim.x / kWarp - kGroupWarps;
  shared.begin(a.stages, workers);
  __syncthreads();
  if (warp >= workers) {
    give_registers<32>();
    if (warp == workers) stream_weights<KC, General>(a, shared);
  } else {
    take_registers<kRowRegisters<kMostGroups<KC, Keys, General>>>();
    uint64_t* buffers = shared.keys + warp * kWarpKeys<Keys>;
    Stream stream(a);
    over_lots<General>(a, [&](int lot) {
      select_rows_of_warp<T, KC, Keys, General>(a, shared, stream, lot, buffers);
    });
  }
}

}  // namespace sae_kernels
