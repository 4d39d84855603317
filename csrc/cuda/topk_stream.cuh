// The stream of weights of topk_fused.cuh: how they lie in memory and in a block's shared memory, in which order the
// tiles of latents come, and the warp that fetches them.
#pragma once

#include "cuda/dynamic_shared.cuh"
#include "cuda/topk_ends.cuh"

namespace sae_kernels {

struct FusedArgs : RowArgs {
  const void* x;               // [rows, d_in], d_in even
  const unsigned char* image;  // of the weights and biases, from arrange_weights
  float* norms;                // [rows to take], or null: gets their norms
  int d_in;
  int stages;          // chunks of weights in shared memory
  int tiles;           // of 64 latents, an even number; those beyond d_sae are never chosen
  int sample, stride;  // tiles that a first bound without a guess is taken from, even, and from one to the next

  __device__ __forceinline__ int sampled() const { return guessed() > 0 ? 0 : sample; }
};

// Warpgroups whose registers hold rows: as many as these can be dealt out to, and no more than there are buffers for.
template <int KC, int Keys, bool General> constexpr int kMostGroups =
    Keys > 5    ? 1
    : !SK_WGMMA ? (KC == 4 || (General && (KC == 2 || Keys > 3)) ? 1 : 2)
                : (Keys > 3 || (General && KC == 4) ? 2 : 3);
template <int Groups> constexpr int kRowRegisters = Groups == 3 ? 160 : Groups == 2 ? 232 : 248;
constexpr int kLimitBytes = kTileLatents * sizeof(float), kLinesBytes = kLineBytes + kLimitBytes;  // of a tile
constexpr int kFewestStages = 4;  // two tiles of two chunks, held until both are looked through
constexpr int fused_threads(int groups) { return (groups + 1) * kGroupWarps * kWarp; }
template <int Keys> constexpr int64_t fused_bytes(int groups, int stages) {
  return 1024 + int64_t(stages) * (kTileBytes + kLinesBytes + 2 * sizeof(Barrier)) + kLineBytes +
         int64_t(groups) * kGroupRows * kRowKeys<Keys> * 8 + 16;
}

// From the block's dynamic shared memory.
struct FusedShared {
  unsigned char *tiles, *lines, *zeros;  // lines: beside a tile's last chunk its biases and its limits
  Barrier *full, *empty;
  Signal* cuts;
  uint64_t* keys;

  __device__ __forceinline__ explicit FusedShared(int stages) {
    unsigned char* at = dynamic_shared();
    tiles = at + (1024 - reinterpret_cast<uintptr_t>(at) % 1024) % 1024;
    lines = tiles + stages * kTileBytes;
    zeros = lines + stages * kLinesBytes;
    full = reinterpret_cast<Barrier*>(zeros + kLineBytes);
    empty = full + stages;
    cuts = reinterpret_cast<Signal*>(empty + stages);
    keys = reinterpret_cast<uint64_t*>(cuts) + 2;
  }
  // Before a barrier of the whole block.
  __device__ __forceinline__ void begin(int stages, int workers) {
    for (int i = threadIdx.x; i < kLineBytes / 4; i += blockDim.x) reinterpret_cast<uint32_t*>(zeros)[i] = 0;
    if (threadIdx.x == 0) {
      cuts->at = 0;
      for (int s = 0; s < stages; ++s) full[s].init(kFillers), empty[s].init(workers);
    }
    show_barriers();
  }
  __device__ __forceinline__ unsigned char* lines_of(int stage) const { return lines + stage * kLinesBytes; }
  __device__ __forceinline__ const float* limits(int stage) const {
    return reinterpret_cast<const float*>(lines_of(stage) + kLineBytes);
  }
};

// A tile of the image: its chunks, each as it is to stand in shared memory, then its biases and its limits: a score at
// or below its limit is none.
__host__ __device__ constexpr int64_t image_bytes(int chunks) { return chunks * kTileBytes + kLinesBytes; }

struct ArrangeArgs {
  const void* W;           // [d_sae, d_in]
  const float* bias;       // [d_sae] or null
  const float* threshold;  // as in SelectArgs of topk_slab.cuh
  unsigned char* image;
  int64_t d_in, d_sae, threshold_step;
  int chunks;              // of a tile
  float beyond;            // bias of what is beyond d_sae
};
constexpr int kArrangeThreads = 256;

// One block per tile.
template <class T> __global__ void __launch_bounds__(kArrangeThreads) arrange_weights(ArrangeArgs a) {
  const T* W = static_cast<const T*>(a.W);
  const int64_t first = int64_t(blockIdx.x) * kTileLatents;
  unsigned char* tile = a.image + blockIdx.x * image_bytes(a.chunks);
  const int columns = a.chunks * 8;  // of 16 bytes
  for (int piece = threadIdx.x; piece < kTileLatents * columns; piece += kArrangeThreads) {
    const int n = piece / columns, column = piece % columns;
    Pack<T, 8> pack = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t d = 8 * column + i;
      if (first + n < a.d_sae && d < a.d_in) pack.at[i] = W[(first + n) * a.d_in + d];
    }
    *reinterpret_cast<Pack<T, 8>*>(tile + column / 8 * kTileBytes + tile_place(n, column % 8)) = pack;
  }
  auto* biases = reinterpret_cast<Pack<T, 8>*>(tile + a.chunks * kTileBytes);
  float* limits = reinterpret_cast<float*>(biases + kTileLatents);
  for (int n = threadIdx.x; n < kTileLatents; n += kArrangeThreads) {
    const int64_t latent = first + n;
    const bool known = latent < a.d_sae;
    biases[n] = {};
    from_acc(!known ? a.beyond : a.bias ? a.bias[latent] : 0.0f, biases[n].at[0]);
    const float none = known ? -__builtin_huge_valf() : __builtin_huge_valf();
    limits[limit_place(n)] = known && a.threshold ? a.threshold[latent * a.threshold_step] : none;
  }
}

// x, of which the compiler then knows that all lanes have the same.
__device__ __forceinline__ int known_to_all(int x) { return __shfl_sync(kAllLanes, x, 0); }

// The rows to take, by their places, in lots of as many as a block holds at once. Calls use(lot) for those of this
// block: of General kernels, which have no register left for more, for one.
template <bool General, class F> __device__ __forceinline__ void over_lots(const FusedArgs& a, F&& use) {
  const unsigned groups = blockDim.x / (kGroupWarps * kWarp) - 1;
  const int lots = known_to_all(int((unsigned((a.size() + kGroupRows - 1) / kGroupRows) + groups - 1) / groups));
  if constexpr (General) {
    if (blockIdx.x < unsigned(lots)) use(blockIdx.x);
  } else {
    for (int lot = blockIdx.x; lot < lots; lot += gridDim.x) use(lot);
  }
}
// The first one of the warp's in a lot.
__device__ __forceinline__ int64_t first_row_of(int lot) {
  const unsigned warp = threadIdx.x / kWarp, workers = blockDim.x / kWarp - kGroupWarps;
  return (int64_t(lot) * workers + warp) * kWarpRows;
}

// Where a block's warp stands in the stream of tiles. For each lot come first those of the sample, evenly spread, then
// all, from wherever the stream is on and round; blocks begin at different ones.
struct Stream {
  int sample, tile, step = 0, stage = 0;
  unsigned round = 0;

  __device__ __forceinline__ explicit Stream(const FusedArgs& a)
      : sample(known_to_all(a.sampled())), tile(blockIdx.x * 5u % unsigned(a.tiles)) {}
  __device__ __forceinline__ int steps(const FusedArgs& a) const { return sample + a.tiles; }
  __device__ __forceinline__ void next_stage(const FusedArgs& a) {
    if (++stage == a.stages) stage = 0, ++round;
  }
  __device__ __forceinline__ void next_tile(const FusedArgs& a) {
    tile += step < sample ? a.stride : 1;
    ++step;
    if (tile >= a.tiles) tile -= a.tiles;
  }
};

// One warp fills the stages, chunk by chunk of 64 elements of each latent of a tile.
template <int KC, bool General> __device__ void stream_weights(const FusedArgs& a, const FusedShared& shared) {
  constexpr int kLines = General ? kLinesBytes : kLineBytes;
  Stream stream(a);
  over_lots<General>(a, [&](int) {
    for (stream.step = 0; stream.step < stream.steps(a); stream.next_tile(a)) {
      const unsigned char* tile = a.image + stream.tile * image_bytes(KC);
#pragma unroll 1
      for (int chunk = 0; chunk < KC; ++chunk, stream.next_stage(a)) {
        if (stream.round > 0) shared.empty[stream.stage].wait((stream.round - 1) % 2);
        Barrier& full = shared.full[stream.stage];
        const bool last = chunk == KC - 1;
        begin_fill(full, kTileBytes + (last ? kLines : 0));
        copy(shared.tiles + stream.stage * kTileBytes, tile + chunk * kTileBytes, kTileBytes, full);
        if (last) copy(shared.lines_of(stream.stage), tile + KC * kTileBytes, kLines, full);
        end_fill(full);
      }
    }
  });
}

}  // namespace sae_kernels
