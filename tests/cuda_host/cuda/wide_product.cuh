// In the place of csrc/cuda/wide_product.cuh: the same product, element by element, and as late as may be.
#pragma once

#include "cuda/tensor_core.cuh"

namespace sae_kernels {

#define SK_HAS_WIDE 1

template <class T> T element_of(const unsigned char* tile, int n, int d) {
  T element;
  std::memcpy(&element, tile + tile_place(n, d / 8) + d % 8 * sizeof element, sizeof element);
  return element;
}
template <class T>
void multiply_wide_now(float (&acc)[4][kAccs], const unsigned char* x, const unsigned char* latents, bool first) {
  const int lane = threadIdx.x % kWarp, warp_row = threadIdx.x / kWarp % 4 * 16;
  for (int i = 0; i < 4 * kAccs; ++i) {
    float& sum = acc[i / kAccs][i % kAccs];
    if (first) sum = 0;
    const int row = warp_row + lane / 4 + 8 * (i / 2 % 2), n = i / 4 * 8 + 2 * (lane % 4) + i % 2;
    for (int d = 0; d < kTileDepth; ++d) sum += to_acc(element_of<T>(x, row, d)) * to_acc(element_of<T>(latents, n, d));
  }
}
template <class T>
void multiply_wide(float (&acc)[4][kAccs], const unsigned char* x, const unsigned char* latents, bool first) {
  if (first)
    for (auto& part : acc) std::fill_n(part, kAccs, std::numeric_limits<float>::quiet_NaN());
  products.push_back([=, &acc] { multiply_wide_now<T>(acc, x, latents, first); });
}
template <class T> void add_wide(float (&acc)[4][kAccs], Line, Line biases) {
  const int column = 2 * (threadIdx.x % 4);
  products.push_back([=, &acc] {
    for (int i = 0; i < 4 * kAccs; ++i) acc[i / kAccs][i % kAccs] += bias_in<T>(biases, i / 4 * 8 + column + i % 2);
  });
}

}  // namespace sae_kernels
