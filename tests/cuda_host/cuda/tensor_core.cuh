// In the place of csrc/cuda/tensor_core.cuh: the same product, element by element, and as late as may be: who gives a
// tile back too early gets wrong results, and ThreadSanitizer sees it.
#pragma once


#include "cuda/pipeline.cuh"

namespace sae_kernels {

constexpr int kTileLatents = 64, kTileDepth = 64, kTileBytes = kTileLatents * kTileDepth * 2, kAccs = 32;
#define SK_WGMMA 0

constexpr int kLinePitch = 16, kLineBytes = kTileLatents * kLinePitch;
struct Line { const unsigned char *at, *zeros; };
inline uint16_t one_of(bf16) { return 0x3f80; }
inline uint16_t one_of(fp16) { return 0x3c00; }
template <class T> float bias_in(Line line, int latent) {
  T bias;
  std::memcpy(&bias, line.at + latent * kLinePitch, sizeof bias);
  return to_acc(bias);
}

inline int tile_place(int n, int c) { return n * 128 + ((c ^ (n & 7)) << 4); }

template <class T, int KC> struct RowTile {
  const T* x;
  int64_t number[2];
  int d_in;

  void load(const T* from, const int64_t (&rows)[2], int d) {
    x = from, d_in = d;
    std::copy(rows, rows + 2, number);
  }
  float squares(int half) const {
    float sum = 0;
    for (int d = 2 * (threadIdx.x % 4); d < d_in && number[half] >= 0; d += 8)
      for (int i = d; i < d + 2; ++i) sum += to_acc(x[number[half] * d_in + i]) * to_acc(x[number[half] * d_in + i]);
    return sum;
  }
};

template <int N> void take_registers() {}
template <int N> void give_registers() {}
constexpr int kProductsAhead = 2;
inline thread_local std::deque<std::function<void()>> products;

template <class T, int KC>
void multiply_now(float (&acc)[kAccs], const RowTile<T, KC>& rows, const unsigned char* tile, int chunk, Line biases) {
  const int lane = threadIdx.x % kWarp;
  for (int i = 0; i < kAccs; ++i) {
    if (chunk == 0) acc[i] = 0;
    const int64_t row = rows.number[i / 2 % 2];
    const int n = i / 4 * 8 + 2 * (lane % 4) + i % 2, left = std::min(kTileDepth, rows.d_in - chunk * kTileDepth);
    for (int d = 0; d < left && row >= 0; ++d) {
      T w;
      std::memcpy(&w, tile + tile_place(n, d / 8) + d % 8 * sizeof w, sizeof w);
      acc[i] += to_acc(rows.x[row * rows.d_in + chunk * kTileDepth + d]) * to_acc(w);
    }
    if (chunk == KC - 1) acc[i] += bias_in<T>(biases, n);
  }
}
template <class T, int KC>
void multiply(float (&acc)[kAccs], const RowTile<T, KC>& rows, const unsigned char* tile, int chunk, Line biases) {
  if (chunk == 0) std::fill_n(acc, kAccs, std::numeric_limits<float>::quiet_NaN());
  products.push_back([&acc, rows, tile, chunk, biases] { multiply_now(acc, rows, tile, chunk, biases); });
}
template <int N> void await_products() {
  for (; products.size() > N; products.pop_front()) products.front()();
}
template <int N> void await_products(float (&)[kAccs]) { await_products<N>(); }

}  // namespace sae_kernels
