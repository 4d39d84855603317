// What every encoder's kernel is given.
#pragma once

#include <cstdint>

namespace sae_kernels {

// All pointers are contiguous row-major; d_sae, d_in, rows, k as in the contract. Fixed: only latents above their own one of
// thresholds [d_sae] compete, and counts [rows] says how many do.
template <class T, class V = T, bool Fixed = false> struct EncodeArgs {
  using Input = T;
  static constexpr bool kFixed = Fixed;
  const T* x; const T* W; const T* bias;  // bias may be null
  int64_t rows, d_in, d_sae, k;
  int activation;
  const int32_t* competitors; int64_t n_competitors; const int32_t* rest;  // competitors null: all
  V* values; int32_t* indices;
  const double* thresholds = nullptr;  // no NaN; at least 0 under relu and abs
  int32_t* counts = nullptr;
};

}  // namespace sae_kernels
