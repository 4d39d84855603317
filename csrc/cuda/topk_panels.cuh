// The k best of every row without pre-activations in memory, for rows too long for registers: a block takes 128 rows
// and a strip of the latents at a time, two warpgroups multiply them by 256 latents after 256, and what a tile leaves
// in their accumulators goes through topk_rows.cuh. The rows' buffers lie in global memory, a block's own, and so in
// L2. Of a strip, every row leaves its k best; where there are several strips a kernel of its own puts them together.
//
// Traffic: of 48 KiB from L2, 128 x 256 x 64 products, which is what binds it; 128 accumulators of a thread are looked
// through once for all of the depth.
#pragma once

#include "cuda/dynamic_shared.cuh"
#include "cuda/tensor_map.cuh"
#include "cuda/topk_ends.cuh"
#include "cuda/wide_product.cuh"

namespace sae_kernels {

constexpr int kWideParts = 4, kWideLatents = kWideParts * kTileLatents, kPanelGroups = 2;
constexpr int kPanelRows = kPanelGroups * kGroupRows, kPanelStages = 4, kPanelKeys = 6;
constexpr int kPanelThreads = (kPanelGroups + 1) * kGroupWarps * kWarp;
constexpr int kRowsBytes = kGroupRows * kTileDepth * 2, kLatentsBytes = kWideLatents * kTileDepth * 2;
constexpr int kWideLineBytes = kWideParts * kLineBytes;
constexpr int kStageBytes = kPanelGroups * kRowsBytes + kLatentsBytes;
constexpr int64_t kPanelBytes =
    1024 + kPanelStages * (kStageBytes + kWideLineBytes + 2 * sizeof(Barrier)) + kLineBytes + kWideLineBytes + 16;
constexpr int64_t kPoolBytes = 1 << 18;  // of a block; a power of two, so that GlobalPool can have it
static_assert(kPoolBytes >= kPanelRows * kRowKeys<kPanelKeys> * int64_t(sizeof(uint64_t)));

struct PanelArgs : RowArgs {
  TensorMap x, W;                  // [rows, d_in] in boxes of 128 rows, [d_sae, d_in] in boxes of 256
  const unsigned char* lines;      // [tiles, kWideLineBytes] biases
  unsigned char* pool;             // [blocks, kPoolBytes], at a multiple of kPoolBytes
  uint64_t* keys;                  // [rows, strips, k]: of each strip, in any order; 0: none
  int depth;                       // chunks of 64 elements
  int tiles;                       // of 256 latents
  int strips, strip_tiles, items;  // items: panels x strips
};

struct PanelShared {
  unsigned char *stages, *lines, *zeros, *ones;
  Barrier *full, *empty;
  Signal* cuts;

  __device__ __forceinline__ PanelShared() {
    unsigned char* at = dynamic_shared();
    stages = at + (1024 - reinterpret_cast<uintptr_t>(at) % 1024) % 1024;
    lines = stages + kPanelStages * kStageBytes;
    ones = lines + kPanelStages * kWideLineBytes;
    zeros = ones + kLineBytes;
    full = reinterpret_cast<Barrier*>(zeros + kWideLineBytes);
    empty = full + kPanelStages;
    cuts = reinterpret_cast<Signal*>(empty + kPanelStages);
  }
  // Before a barrier of the whole block. one: its bits in the type of x.
  __device__ __forceinline__ void begin(uint32_t one, int workers) {
    for (int i = threadIdx.x; i < (kLineBytes + kWideLineBytes) / 4; i += blockDim.x)
      reinterpret_cast<uint32_t*>(ones)[i] = i < kLineBytes / 4 && i % (kLinePitch / 4) == 0 ? one : 0;
    if (threadIdx.x == 0) {
      cuts->at = 0;
      for (int s = 0; s < kPanelStages; ++s) full[s].init(kFillers), empty[s].init(workers);
    }
    show_barriers();
  }
};

// Where a warp stands in its block's stream of stages, over all of the block's items.
struct StageAt {
  int stage = 0;
  unsigned round = 0;
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
        const bool last = chunk == a.depth - 1;
        begin_fill(full, kStageBytes + last * kWideLineBytes);
        copy_box(stage, a.x, int(row), chunk * kTileDepth, full);
        copy_box(stage + kPanelGroups * kRowsBytes, a.W, tile * kWideLatents, chunk * kTileDepth, full);
        const unsigned char* lines = a.lines + int64_t(tile) * kWideLineBytes;
        if (last) copy(shared.lines + at.stage * kWideLineBytes, lines, kWideLineBytes, full);
        end_fill(full);
      }
  });
}

// The pre-activations of a tile, of the warp's rows.
template <class T> __device__ __forceinline__ void wide_tile(const PanelArgs& a, const PanelShared& shared, int group,
                                                             StageAt& at, float (&acc)[kWideParts][kAccs]) {
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
  add_wide<T>(acc, {shared.ones, shared.zeros}, {shared.lines + held * kWideLineBytes, shared.zeros});
#pragma unroll
  for (int part = 0; part < kWideParts; ++part) await_products<0>(acc[part]);
  give_back(held);
}

// One warp's rows of all items of its block.
template <class T> __device__ void select_strips(const PanelArgs& a, const PanelShared& shared, int warp) {
  const int lane = threadIdx.x % kWarp;
  uint64_t* buffers = reinterpret_cast<uint64_t*>(a.pool + blockIdx.x * kPoolBytes) + warp * kWarpKeys<kPanelKeys>;
  const GlobalPool pool{reinterpret_cast<unsigned char*>(buffers + lane)};
  StageAt at;
  over_items(a, [&](int64_t row, int strip, int first, int end) {
    RowState<GlobalPool> rows{};
    rows.cuts = shared.cuts->read();
    begin_rows(a, row + warp * kWarpRows, pool, buffers, rows);
    for (int tile = first; tile < end; ++tile) {
      float acc[kWideParts][kAccs];
      wide_tile<T>(a, shared, warp / kGroupWarps, at, acc);
      const int seen = tile - first;
      if (seen == 0) {
        float best[2 * kAccs];
#pragma unroll
        for (int i = 0; i < 2 * kAccs; ++i) best[i] = fmaxf(acc[i / kAccs][i % kAccs], acc[i / kAccs + 2][i % kAccs]);
        bound_rows(a, best, rows);
      }
      keep_best<kPanelKeys, false>(a, acc, nullptr, tile * kWideLatents + 2 * (lane % 4), pool, buffers, rows,
                                   *shared.cuts, (seen & (seen - 1)) == 0);
    }
    cut_rows<kPanelKeys, false, false>(a, a.k, buffers, rows);
#pragma unroll 1
    for (int number = 0; number < kWarpRows && row + warp * kWarpRows + number < a.rows; ++number) {
      uint64_t* keys = a.keys + ((row + warp * kWarpRows + number) * a.strips + strip) * a.k;
      const int n = best_keys<kPanelKeys, false>(a, rows, number, buffers, first * kWideLatents,
                                                 min(end * kWideLatents, a.d_sae),
                                                 [&](int j, uint64_t key) { keys[j] = key; });
      for (int j = n + lane; j < a.k; j += kWarp) keys[j] = 0;
    }
  });
}

// As many blocks as there are multiprocessors; the last warpgroup only copies.
template <class T>
__global__ void __launch_bounds__(kPanelThreads, 1) topk_encode_panels(const __grid_constant__ PanelArgs a) {
#if SK_HAS_WIDE
  PanelShared shared;
  const int warp = __shfl_sync(kAllLanes, int(threadIdx.x / kWarp), 0), workers = kPanelGroups * kGroupWarps;
  shared.begin(one_of(T{}), workers);
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

struct WarpTeam { static constexpr int kTeam = kWarp; };

struct MergeArgs {
  const uint64_t* keys;  // [rows, n], n from k to kLargestMerge
  void* values;          // [rows, k]
  int32_t* indices;      // [rows, k]
  int64_t rows;
  int n, k, room;        // room: a power of two, n or more
  Out dtype;
};
constexpr int kMergeRows = 4, kLargestMerge = 4096;

// The k best keys of a row, in order: one warp per row. N: keys of a lane, or 0 where they are too many for registers.
template <int N> __global__ void __launch_bounds__(kMergeRows * kWarp) merge_strips(MergeArgs a) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * kMergeRows + warp;
  if (row >= a.rows) return;
  uint64_t* buffer = reinterpret_cast<uint64_t*>(dynamic_shared()) + warp * a.room;
  for (int i = lane; i < a.n; i += kWarp) buffer[i] = a.keys[row * a.n + i];
  int count = a.n;
  if constexpr (N > 0) {
    uint32_t bound;
    const auto from = [&](int i) { return i * kWarp + lane < a.n ? i * kWarp + lane : -1; };
    const auto key = [](uint64_t entry) { return entry; };
    count = cut<N>(buffer, from, a.k, a.k, key, [](int j) { return j; }, bound);
  }
  sort_descending<WarpTeam>(buffer, count, a.k, lane);
  for (int j = lane; j < a.k; j += kWarp)
    write_code(a.values, a.indices, a.dtype, row * a.k + j, buffer[j], false);
}

}  // namespace sae_kernels
