// In the place of csrc/cuda/tensor_core.cuh: the same product, element by element.
#pragma once

#include "cuda/pipeline.cuh"

namespace sae_kernels {

constexpr int kTileLatents = 64, kTileDepth = 64, kTileBytes = kTileLatents * kTileDepth * 2, kAccs = 32;
#define SK_WGMMA 0

inline int tile_place(int n, int c) { return n * 128 + ((c ^ (n & 7)) << 4); }

template <class T, int KC> struct RowTile {
  const T* x;
  int64_t row, rows;
  int d_in;

  void load(const T* from, int64_t first, int64_t all, int d) { x = from, row = first, rows = all, d_in = d; }
};

inline void take_registers() {}
inline void give_registers() {}
inline void begin_product(float (&acc)[kAccs]) {
  for (float& c : acc) c = 0;
}
template <class T, int KC>
void multiply(float (&acc)[kAccs], const RowTile<T, KC>& rows, const unsigned char* tile, int chunk) {
  const int lane = threadIdx.x % kWarp;
  for (int i = 0; i < kAccs; ++i) {
    const int64_t row = rows.row + lane / 4 + 8 * (i / 2 % 2);
    const int n = i / 4 * 8 + 2 * (lane % 4) + i % 2, left = std::min(kTileDepth, rows.d_in - chunk * kTileDepth);
    if (row >= rows.rows) continue;
    for (int d = 0; d < left; ++d) {
      T w;
      std::memcpy(&w, tile + tile_place(n, d / 8) + d % 8 * sizeof w, sizeof w);
      acc[i] += to_acc(rows.x[row * rows.d_in + chunk * kTileDepth + d]) * to_acc(w);
    }
  }
}
inline void end_product(float (&)[kAccs]) {}

}  // namespace sae_kernels
