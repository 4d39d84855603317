// The k best of every row without pre-activations in memory, for rows too long for registers: a block takes 128 rows
// and a strip of the latents at a time, two warpgroups multiply them by 256 latents after 256, and what a tile leaves
// in their accumulators goes through topk_rows.cuh. The rows' buffers lie in global memory, a block's own, and so in
// L2. Of a strip, every row leaves its k best; the strips' are put together afterwards. Blocks that run at once take
// few panels of rows and all strips, so that x and what W has in use stay in L2.
//
// Traffic: of 48 KiB from L2, 128 x 256 x 64 products; 128 accumulators of a thread are looked through once for all of
// the depth.
#pragma once

#include "cuda/dynamic_shared.cuh"
#include "cuda/tensor_map.cuh"
#include "cuda/topk_rows.cuh"
#include "cuda/wide_product.cuh"

namespace sae_kernels {

constexpr int kWideParts = 4, kWideLatents = kWideParts * kTileLatents, kPanelGroups = 2;
constexpr int kPanelRows = kPanelGroups * kGroupRows, kPanelStages = 4, kPanelKeys = 5;
constexpr int kPanelThreads = (kPanelGroups + 1) * kGroupWarps * kWarp;
constexpr int kRowsBytes = kGroupRows * kTileDepth * 2, kLatentsBytes = kWideLatents * kTileDepth * 2;
constexpr int kStageBytes = kPanelGroups * kRowsBytes + kLatentsBytes;
constexpr int64_t kPanelBytes = 1024 + kPanelStages * (kStageBytes + 2 * sizeof(Barrier));
constexpr int64_t kPoolBytes = int64_t(kPanelRows) * kRowKeys<kPanelKeys> * sizeof(uint64_t);  // of a block

struct PanelArgs : RowArgs {
  TensorMap x, W;        // [rows, d_in] in boxes of 128 rows, [d_sae, d_in] in boxes of 256
  const float* lines;    // [4 tiles, 64] biases, as lines of topk_stream.cuh
  unsigned char* pool;   // [blocks, kPoolBytes]
  int64_t* keys;         // [rows, strips, k]: of each strip, in any order, for write_codes
  int depth;             // chunks of 64 elements
  int tiles;             // of 256 latents
  int strips, strip_tiles, items;  // items: panels x strips
};

struct PanelShared {
  unsigned char* stages;
  Barrier *full, *empty;

  __device__ __forceinline__ PanelShared() {
    unsigned char* at = dynamic_shared();
    stages = at + (1024 - reinterpret_cast<uintptr_t>(at) % 1024) % 1024;
    full = reinterpret_cast<Barrier*>(stages + kPanelStages * kStageBytes);
    empty = full + kPanelStages;
  }
};

// Where a warp stands in its block's stream of stages, over all of the block's items.
struct StageAt {
  int stage = 0, round = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kPanelStages) stage = 0, ++round;
  }
};

// Calls use(first row, strip, its first tile, the tile after its last) for the items of this block.
template <class F> __device__ __forceinline__ void over_items(const PanelArgs& a, F&& use) {
  for (int item = blockIdx.x; item < a.items; item += gridDim.x) {
    const int first = item % a.strips * a.strip_tiles;
    use(int64_t(item / a.strips) * kPanelRows, item % a.strips, first, min(a.tiles, first + a.strip_tiles));
  }
}

// One warp fills the stages.
__device__ void stream_panels(const PanelArgs& a, const PanelShared& shared) {
  StageAt at;
  over_items(a, [&](int64_t row, int, int first, int end) {
    for (int tile = first; tile < end; ++tile)
      for (int chunk = 0; chunk < a.depth; ++chunk, at.next()) {
        if (at.round > 0) shared.empty[at.stage].wait((at.round - 1) % 2);
        unsigned char* stage = shared.stages + at.stage * kStageBytes;
        Barrier& full = shared.full[at.stage];
        begin_fill(full, kStageBytes);
        copy_box(stage, a.x, int(row), chunk * kTileDepth, full);
        copy_box(stage + kPanelGroups * kRowsBytes, a.W, tile * kWideLatents, chunk * kTileDepth, full);
        end_fill(full);
      }
  });
}

// The pre-activations of a tile, of the warp's rows.
template <class T> __device__ __forceinline__ void wide_tile(const PanelArgs& a, const PanelShared& shared, int group,
                                                             int tile, StageAt& at, float (&acc)[kWideParts][kAccs]) {
  const auto give_back = [&](int stage) {
    __syncwarp();  // of all lanes
    if (threadIdx.x % kWarp == 0) shared.empty[stage].arrive();
  };
  const auto multiply_next = [&](bool first) {
    shared.full[at.stage].wait(at.round % 2);
    const unsigned char* stage = shared.stages + at.stage * kStageBytes;
    multiply_wide<T>(acc, stage + group * kRowsBytes, stage + kPanelGroups * kRowsBytes, first);
  };
  multiply_next(true);
  int held = at.stage;
  at.next();
  for (int chunk = 1; chunk < a.depth; ++chunk) {
    multiply_next(false);
    await_products<1>();
    give_back(held);
    held = at.stage;
    at.next();
  }
#pragma unroll
  for (int part = 0; part < kWideParts; ++part) await_products<0>(acc[part]);
  give_back(held);
#pragma unroll
  for (int part = 0; part < kWideParts; ++part) {
    LineOfLane bias;
    bias.load(a.lines + int64_t(tile * kWideParts + part) * kTileLatents);
#pragma unroll
    for (int i = 0; i < kAccs; ++i) acc[part][i] += bias.of(i / 4 * 2 + i % 2);
  }
}

// One warp's rows of all items of its block.
template <class T> __device__ void select_strips(const PanelArgs& a, const PanelShared& shared, int warp) {
  const int lane = threadIdx.x % kWarp;
  unsigned char* pool = a.pool + blockIdx.x * kPoolBytes;
  uint64_t* buffers = reinterpret_cast<uint64_t*>(pool) + warp * kWarpRows * kRowKeys<kPanelKeys>;
  StageAt at;
  over_items(a, [&](int64_t row, int strip, int first, int end) {
    RowState rows{};
    begin_rows<kPanelKeys>(a, row + warp * kWarpRows, pool, buffers, rows);
    for (int tile = first; tile < end; ++tile) {
      float acc[kWideParts][kAccs];
      wide_tile<T>(a, shared, warp / kGroupWarps, tile, at, acc);
      if (tile == first) {
        float best[2 * kAccs];
#pragma unroll
        for (int i = 0; i < 2 * kAccs; ++i) best[i] = fmaxf(acc[i / kAccs][i % kAccs], acc[i / kAccs + 2][i % kAccs]);
        bound_rows(a, best, rows);
      }
#pragma unroll
      for (int part = 0; part < kWideParts; ++part)
        keep_best<kPanelKeys, false>(a, acc[part], LineOfLane(),
                                     tile * kWideLatents + part * kTileLatents + 2 * (lane % 4), pool, buffers, rows);
    }
#pragma unroll 1
    for (int number = 0; number < kWarpRows; ++number) {
      const int64_t mine = row + warp * kWarpRows + number;
      if (mine >= a.rows) break;
      uint64_t* buffer = buffers + number * kRowKeys<kPanelKeys>;
      const int n = best_keys<kPanelKeys>(a, rows, number % 8, number / 8, buffer, first * kWideLatents,
                                          min(end * kWideLatents, a.d_sae));
      int64_t* keys = a.keys + (mine * a.strips + strip) * a.k;
      for (int j = lane; j < a.k; j += kWarp) keys[j] = int64_t((j < n ? buffer[j] : 0) ^ kFlip);
      __syncwarp();
    }
  });
}

// As many blocks as there are multiprocessors; the last warpgroup only copies.
template <class T>
__global__ void __launch_bounds__(kPanelThreads, 1) topk_encode_panels(const __grid_constant__ PanelArgs a) {
#if SK_HAS_WIDE
  const PanelShared shared;
  const int warp = __shfl_sync(kAllLanes, int(threadIdx.x / kWarp), 0), workers = kPanelGroups * kGroupWarps;
  if (threadIdx.x == 0)
    for (int s = 0; s < kPanelStages; ++s) shared.full[s].init(kFillers), shared.empty[s].init(workers);
  show_barriers();
  __syncthreads();
  if (warp >= workers) {
    give_registers<24>();
    if (warp == workers) stream_panels(a, shared);
  } else {
    take_registers<240>();
    select_strips<T>(a, shared, warp);
  }
#endif
}

}  // namespace sae_kernels
