// Half precision for the host execution of CUDA kernels.
#pragma once

#include <cstdint>
#include <cstring>

struct __half { _Float16 value; };

inline __half __ushort_as_half(uint16_t bits) {
  __half h;
  std::memcpy(&h, &bits, sizeof h);
  return h;
}
inline uint16_t __half_as_ushort(__half h) {
  uint16_t bits;
  std::memcpy(&bits, &h, sizeof bits);
  return bits;
}
inline float __half2float(__half h) { return static_cast<float>(h.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
