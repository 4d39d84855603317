// The k best of every row without pre-activations in memory, for rows too long for registers: a block takes 128 rows
// and a strip of the latents at a time, two warpgroups multiply them by 256 latents after 256, and what a tile leaves
// in their accumulators goes through topk_rows.cuh. The rows' buffers lie in global memory, a block's own, and so in
// L2. Of a strip, every row leaves its k best; where there are several strips a kernel of its own puts them together.
//
// Traffic: of 48 KiB from L2, 128 x 256 x 64 products, and the panels from memory for every tile where L2 does not hold
// those of all blocks; 128 accumulators of a thread are looked through once for all of the depth, no product meanwhile.
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
constexpr int64_t kPoolBytes = int64_t(kPanelRows) * kRowKeys<kPanelKeys> * sizeof(uint64_t);  // of a block

struct PanelArgs : RowArgs {
  TensorMap x, W;                  // [rows, d_in] in boxes of 128 rows, [d_sae, d_in] in boxes of 256
  const unsigned char* lines;      // [tiles, kWideLineBytes] biases
  unsigned char* pool;             // [blocks, kPoolBytes]
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

// The best keys of a warp's rows in a strip of latents, `begin` to `end`, to a.keys.
__device__ __forceinline__ void finish_strip(const PanelArgs& a, int64_t first_row, int strip, int begin, int end,
                                             uint64_t* buffers, RowState<GlobalPool>& rows) {
  const int lane = lane_now();
  const auto keys_of = [&](int row) { return a.keys + ((first_row + row) * a.strips + strip) * a.k; };
  bool odd[2] = {};  // rows that do not have just k keys
  cut_rows<kPanelKeys, false, true>(a, a.k, buffers, rows, [&](int row, int all, int j, uint64_t entry) {
    const uint64_t key = KeyOf(a)(entry);
    if (all == a.k && first_row + row < a.rows) keys_of(row)[j] = key;
    (row < 8 ? odd[0] : odd[1]) |= key == 0;
  });
  unsigned left = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int entries = row_sum(rows.count(half));
    const unsigned votes = __ballot_sync(kAllLanes, odd[half] || entries != a.k);
    for (int quad = 0; quad < 8; ++quad) left |= (votes >> 4 * quad & 0xf) ? 1u << (quad + 8 * half) : 0;
  }
#pragma unroll 1
  for (; left; left &= left - 1) {
    const int row = __ffs(left) - 1;
    if (first_row + row >= a.rows) break;
    uint64_t* keys = keys_of(row);
    const int n = best_keys<kPanelKeys, false>(a, rows, row, buffers, begin, end,
                                               [&](int j, uint64_t key) { keys[j] = key; });
    for (int j = n + lane; j < a.k; j += kWarp) keys[j] = 0;
  }
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
    finish_strip(a, row + warp * kWarpRows, strip, first * kWideLatents, min(end * kWideLatents, a.d_sae), buffers,
                 rows);
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

struct MergeArgs {
  const uint64_t* keys;  // [rows, n], n from k to kLargestMerge
  void* values;          // [rows, k]
  int32_t* indices;      // [rows, k]
  int64_t rows;
  int n, k, room;        // room: of a row in shared memory, a power of two, n or more
  Out dtype;
};
constexpr int kMergeRows = 4, kLargestMerge = 4096;

// The k best keys of a row, in order: one warp per row. N: keys of a lane, or 0 where they are too many for registers;
// Best: 32 times as many are at least k.
template <int N, int Best> __global__ void __launch_bounds__(kMergeRows * kWarp) merge_strips(MergeArgs a) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * kMergeRows + warp;
  if (row >= a.rows) return;
  uint64_t* buffer = reinterpret_cast<uint64_t*>(dynamic_shared()) + warp * a.room;
  for (int i = lane; i < a.n; i += kWarp) buffer[i] = a.keys[row * a.n + i];
  const auto write = [&](int j, uint64_t key) {
    if (j < a.k) write_code(a.values, a.indices, a.dtype, row * a.k + j, key, false);
  };
  if constexpr (N > 0) {
    uint32_t bound;
    const auto from = [&](int i) { return i * kWarp + lane < a.n ? i * kWarp + lane : -1; };
    const int n = cut<N>(buffer, from, a.k, a.k, [](uint64_t key) { return key; }, [](int j) { return j; }, bound);
    uint64_t key[Best];
#pragma unroll
    for (int i = 0; i < Best; ++i) key[i] = i * kWarp + lane < n ? buffer[i * kWarp + lane] : 0;
    sort_keys<1, Best>(key);
#pragma unroll
    for (int i = 0; i < Best; ++i) write(i * kWarp + lane, key[i]);
  } else {
    sort_descending<WarpTeam>(buffer, a.n, a.k, lane);
    for (int j = lane; j < a.k; j += kWarp) write(j, buffer[j]);
  }
}

}  // namespace sae_kernels
