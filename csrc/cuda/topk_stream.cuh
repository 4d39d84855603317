// The stream of weights of topk_fused.cuh: how a block's shared memory is laid out, in which order the tiles of latents
// come, and the warp that fetches them.
#pragma once

#include "cuda/dynamic_shared.cuh"
#include "cuda/tensor_core.cuh"
#include "cuda/topk_keys.cuh"

namespace sae_kernels {

struct FusedArgs {
  const void* x;    // [rows, d_in], d_in a multiple of 8
  const void* W;    // [d_sae, d_in], d_sae a multiple of 64
  const float* bias;       // [d_sae] or null
  const float* threshold;  // as in SelectArgs of topk_select.cuh
  int32_t* passed;         // [rows], or null: of those above their threshold
  void* values;            // [rows, k]
  int32_t* indices;        // [rows, k]
  int64_t rows;
  int d_in, k, threshold_step, activation;
  int stages;          // chunks of weights in shared memory
  int tiles;           // d_sae / 64
  int sample, stride;  // tiles that the first bound is taken from, 0 for none, and the way from one to the next
  Out dtype;
};

constexpr int kGroupWarps = 4, kWarpRows = 16, kGroupRows = kGroupWarps * kWarpRows;
// Warpgroups whose registers hold rows: three where they can be dealt out, fewer where rows of 256 leave too few.
template <int KC> constexpr int kMostGroups = SK_WGMMA ? 3 : KC == 4 ? 1 : 2;
constexpr int kHalfBits = kAccs / 4, kHalfLatents = kTileLatents / 2;  // of half a tile: a lane's in a row, a row's
constexpr int kBiasBytes = kTileLatents * sizeof(float);
constexpr int kInFlight = 3;  // chunks of weights on their way; a tile's chunks beside them must fit the stages
constexpr int fused_threads(int groups) { return (groups + 1) * kGroupWarps * kWarp; }
// A row's buffer and one key more, so that rows begin at different banks.
template <int Keys> constexpr int kRowKeys = Keys * kWarp + 1;
// The largest k that leaves room for half a tile beside k and the slack of a cut.
template <int Keys> constexpr int kLargestFused = Keys * kWarp - kHalfLatents;
template <int Keys> constexpr int64_t fused_bytes(int groups, int stages) {
  return 1024 + int64_t(stages) * (kTileBytes + kBiasBytes + 2 * sizeof(Barrier)) +
         groups * kGroupRows * kRowKeys<Keys> * 8;
}

// From the block's dynamic shared memory.
struct FusedShared {
  unsigned char* tiles;
  float* bias;  // of a tile, beside its first chunk
  Barrier *full, *empty;
  uint64_t* keys;

  __device__ __forceinline__ explicit FusedShared(int stages) {
    unsigned char* at = dynamic_shared();
    tiles = at + (1024 - reinterpret_cast<uintptr_t>(at) % 1024) % 1024;
    bias = reinterpret_cast<float*>(tiles + stages * kTileBytes);
    full = reinterpret_cast<Barrier*>(bias + stages * kTileLatents);
    empty = full + stages;
    keys = reinterpret_cast<uint64_t*>(empty + stages);
  }
};

// Where a block's warp stands in the stream of tiles: first the sample, evenly spread, then all; blocks begin at
// different ones.
struct Stream {
  int tile, step = 0, stage = 0, round = 0;

  __device__ __forceinline__ explicit Stream(const FusedArgs& a) : tile(begin(a)) {}
  static __device__ __forceinline__ int begin(const FusedArgs& a) { return blockIdx.x * 5u % unsigned(a.tiles); }
  static __device__ __forceinline__ int steps(const FusedArgs& a) { return a.sample + a.tiles; }
  __device__ __forceinline__ void next_stage(const FusedArgs& a) {
    if (++stage == a.stages) stage = 0, ++round;
  }
  __device__ __forceinline__ void next_tile(const FusedArgs& a) {
    ++step;
    tile += step < a.sample ? a.stride : 1;
    if (step == a.sample) tile = begin(a);
    if (tile >= a.tiles) tile -= a.tiles;
  }
};

// One warp fills the stages, chunk by chunk of 64 elements of each latent of a tile.
template <class T, int KC> __device__ void stream_weights(const FusedArgs& a, const FusedShared& shared) {
  const int lane = threadIdx.x % kWarp, column = lane % 8;
  const T* W = static_cast<const T*>(a.W);
  Stream stream(a);
  int arrived = 0, filled = 0;  // stages in turn
  const auto tell = [&] {
    shared.full[arrived].arrive();
    if (++arrived == a.stages) arrived = 0;
  };
  for (const int steps = Stream::steps(a); stream.step < steps; stream.next_tile(a)) {
    const int64_t latent = int64_t(stream.tile) * kTileLatents;
#pragma unroll 1
    for (int chunk = 0; chunk < KC; ++chunk, stream.next_stage(a)) {
      if (stream.round > 0) shared.empty[stream.stage].wait((stream.round - 1) % 2);
      const int d = chunk * kTileDepth + 8 * column;
      const bool inside = d < a.d_in;
      const T* from = W + (latent + lane / 8) * a.d_in + (inside ? d : 0);
      unsigned char* tile = shared.tiles + stream.stage * kTileBytes;
#pragma unroll
      for (int i = 0; i < kTileLatents / 4; ++i)
        copy_16(tile + tile_place(lane / 8 + 4 * i, column), from + int64_t(4 * i) * a.d_in, inside);
      if (chunk == 0 && lane < kTileLatents / 4) {
        const void* bias = a.bias ? static_cast<const void*>(a.bias + latent + 4 * lane) : a.W;
        copy_16(shared.bias + stream.stage * kTileLatents + 4 * lane, bias, a.bias != nullptr);
      }
      end_copies();
      if (filled < kInFlight) {
        ++filled;
      } else {
        await_copies<kInFlight>();
        tell();
      }
    }
  }
  await_copies<0>();
  for (; filled > 0; --filled) tell();
}

}  // namespace sae_kernels
