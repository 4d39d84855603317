// A product on tensor cores: 16 rows of x per warp, held in registers, times 64 latents whose weights stand in shared
// memory, 64 elements of each at a time. Accumulators [16, 64] lie as in mma.m16n8k16 and wgmma: of lane l,
// acc[4 j + i] is row l / 4 + 8 (i / 2), latent 8 j + 2 (l % 4) + i % 2. tests/cuda_host has a twin of this file.
#pragma once

#include "cuda/pipeline.cuh"

namespace sae_kernels {

constexpr int kTileLatents = 64, kTileDepth = 64, kTileBytes = kTileLatents * kTileDepth * 2, kAccs = 32;

// Where 16 bytes of a tile stand: latent n, elements 8 c to 8 c + 7. Exclusive or spreads a column over all banks; it
// is the 128-byte swizzle of wgmma where the tile begins at a multiple of 1024 bytes.
__device__ __forceinline__ int tile_place(int n, int c) { return n * 128 + ((c ^ (n & 7)) << 4); }

// wgmma is of sm_90a alone
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SK_WGMMA 1
#else
#define SK_WGMMA 0
#endif

// The 16 bytes that a row or latent has in a line: one number of its storage type, the rest 0.
constexpr int kLinePitch = 16, kLineBytes = kTileLatents * kLinePitch;
// Biases come into a product as a further step of its depth: a line of them times a line of ones. zeros: as long.
struct Line { const unsigned char *at, *zeros; };

__device__ __forceinline__ uint16_t one_of(bf16) { return 0x3f80; }
__device__ __forceinline__ uint16_t one_of(fp16) { return 0x3c00; }

// Depth 64 KC of 16 rows of x [., d_in], d_in even; what lies outside is 0.
template <class T, int KC> struct RowTile {
  uint32_t at[4 * KC][4], ones[4];  // ones: a line of them

  // number: of the rows that the lane has a part in, l / 4 and l / 4 + 8 of the warp's; -1: there is none.
  __device__ __forceinline__ void load(const T* x, const int64_t (&number)[2], int d_in) {
    const int lane = threadIdx.x % kWarp;
    ones[0] = ones[1] = lane % 4 == 0 ? one_of(T{}) : 0;
    ones[2] = ones[3] = 0;
    asm("" : "+r"(ones[0]), "+r"(ones[1]), "+r"(ones[2]), "+r"(ones[3]));  // to stay in registers side by side
#pragma unroll
    for (int step = 0; step < 4 * KC; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t r = number[i % 2];
        const int d = 16 * step + 2 * (lane % 4) + 8 * (i / 2);
        at[step][i] = r >= 0 && d < d_in ? *reinterpret_cast<const uint32_t*>(x + r * d_in + d) : 0;
      }
  }
  // The sum of the squares of what the lane has of its lower (0) or upper (1) row.
  __device__ __forceinline__ float squares(int half) const {
    float sum = 0;
#pragma unroll
    for (int step = 0; step < 4 * KC; ++step)
#pragma unroll
      for (int i = half; i < 4; i += 2) {
        const float low = to_acc(T{uint16_t(at[step][i])}), high = to_acc(T{uint16_t(at[step][i] >> 16)});
        sum += low * low + high * high;
      }
    return sum;
  }
};

#if SK_WGMMA
// For wgmma: start / 16; from elements 0 to 7 to the zeros in the place of 8 to 15, / 16; 128 / 16 from 8 rows to 8.
__device__ __forceinline__ uint64_t matrix_at(Line line) {
  const uint32_t at = shared_address(line.at), further = shared_address(line.zeros) - at;
  return (at >> 4) | uint64_t(further >> 4 & 0x3fff) << 16 | uint64_t(8) << 32;
}
// For wgmma: start / 16; stride of 8 rows 1024 / 16; 128-byte swizzle.
__device__ __forceinline__ uint64_t matrix_at(const unsigned char* tile) {
  return (shared_address(tile) >> 4) | uint64_t(1) << 16 | uint64_t(64) << 32 | uint64_t(1) << 62;
}
#endif

template <class T> struct Mma;
#define SK_MMA(T, NAME)                                                                                               \
  template <> struct Mma<T> {                                                                                         \
    static __device__ __forceinline__ void warp(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {              \
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "       \
                   "{%8,%9}, {%0,%1,%2,%3};"                                                                          \
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                   \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                   \
    }                                                                                                                 \
    SK_GROUP(NAME)                                                                                                    \
  };
#if SK_WGMMA
#define SK_GROUP(NAME)                                                                                                \
  static __device__ __forceinline__ void group(float (&c)[kAccs], const uint32_t* a, uint64_t b, int add) {           \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0;\n"                                                           \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " "                                      \
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"    \
                 "%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, 0; }"                                    \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),    \
                   "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]),           \
                   "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]),         \
                   "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]),         \
                   "+f"(c[29]), "+f"(c[30]), "+f"(c[31])                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                     \
  }
#else
#define SK_GROUP(NAME)
#endif
SK_MMA(bf16, "bf16")
SK_MMA(fp16, "f16")
#undef SK_MMA
#undef SK_GROUP

// How a block's registers are shared out, by whole warpgroups: more for those that hold rows, few for who only copies.
template <int N> __device__ __forceinline__ void take_registers() {
#if SK_WGMMA
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
template <int N> __device__ __forceinline__ void give_registers() {
#if SK_WGMMA
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

// Products that may run while a warp does other things.
constexpr int kProductsAhead = SK_WGMMA ? 2 : 1;

// Adds elements 64 CHUNK to 64 CHUNK + 63 of every latent in `tile`, which a barrier has shown to be there; chunk 0
// begins anew, the last one adds the biases. acc, tile and biases belong to the product until await_products.
template <class T, int KC> __device__ __forceinline__ void multiply(float (&acc)[kAccs], const RowTile<T, KC>& rows,
                                                                    const unsigned char* tile, int chunk, Line biases) {
#if SK_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  const uint64_t b = matrix_at(tile);
#pragma unroll
  for (int step = 0; step < 4; ++step)
    Mma<T>::group(acc, rows.at[4 * chunk + step], b + 2 * step, chunk + step > 0);
  if (chunk == KC - 1) Mma<T>::group(acc, rows.ones, matrix_at(biases), 1);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  const int lane = threadIdx.x % kWarp;
  if (chunk == 0)
#pragma unroll
    for (float& c : acc) c = 0.0f;
#pragma unroll
  for (int step = 0; step < 4; ++step)
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const int n = 16 * pair + lane / 16 * 8 + lane % 8, c = 2 * step + lane / 8 % 2;
      uint32_t b[4];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(shared_address(tile + tile_place(n, c))));
      Mma<T>::warp(acc + 8 * pair, rows.at[4 * chunk + step], b[0], b[1]);
      Mma<T>::warp(acc + 8 * pair + 4, rows.at[4 * chunk + step], b[2], b[3]);
    }
  if (chunk < KC - 1) return;
#pragma unroll
  for (int i = 0; i < kTileLatents / 8; ++i) {
    const auto* at = reinterpret_cast<const uint32_t*>(biases.at + (8 * i + lane / 4) * kLinePitch);
    Mma<T>::warp(acc + 4 * i, rows.ones, lane % 4 == 0 ? *at : 0, 0);
  }
#endif
}

// All but the last N calls of `multiply` are done.
template <int N> __device__ __forceinline__ void await_products() {
#if SK_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}
// The same, and acc may be read.
template <int N> __device__ __forceinline__ void await_products(float (&acc)[kAccs]) {
  await_products<N>();
#if SK_WGMMA
#pragma unroll
  for (float& c : acc) asm volatile("" : "+f"(c)::"memory");
#endif
}

}  // namespace sae_kernels
