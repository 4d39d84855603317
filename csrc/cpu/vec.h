// Vectors as the compiler knows them, one width per instruction set; conversions between storage and accumulator types.
#pragma once

#include <cstdint>
#include <cstring>
#include <torch/csrc/stable/c/shim.h>

#include "cpu/isa.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sae_kernels {
namespace SK_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class A> struct VecOf { typedef A type __attribute__((vector_size(kVecBytes))); };
template <class A> using Vec = typename VecOf<A>::type;
template <class A> constexpr int kLanes = kVecBytes / sizeof(A);

inline float to_acc(float v) { return v; }
inline double to_acc(double v) { return v; }
inline float to_acc(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float to_acc(fp16 v) {
  // shift exponent and mantissa into place, then rescale: denormals come out right, the all-ones exponent is mended
  const uint32_t bits = (v.bits & 0x7fffu) << 13;
  float f;
  std::memcpy(&f, &bits, 4);
  f *= 0x1p112f;
  uint32_t out;
  std::memcpy(&out, &f, 4);
  if ((v.bits & 0x7c00u) == 0x7c00u) out |= 0x7f800000u;
  out |= (v.bits & 0x8000u) << 16;
  std::memcpy(&f, &out, 4);
  return f;
}

// rounds to nearest, ties to even
template <class T, class A> inline T from_acc(A v);
template <> inline float from_acc<float>(float v) { return v; }
template <> inline double from_acc<double>(double v) { return v; }
template <> inline bf16 from_acc<bf16>(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (v != v) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <> inline fp16 from_acc<fp16>(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint16_t sign = (bits >> 16) & 0x8000u;
  if (v != v) return {static_cast<uint16_t>(sign | 0x7e00u)};
  bits &= 0x7fffffffu;
  if (bits >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (bits < 0x38800000u) {  // denormal: adding 0.5 leaves the rounded mantissa in the low bits
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1u);
  return {static_cast<uint16_t>(sign | (bits >> 13))};
}

template <class A> inline Vec<A> splat(A v) { return Vec<A>{} + v; }

template <class T> inline Vec<Acc<T>> load(const T* p) {
  Vec<Acc<T>> v;
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    std::memcpy(&v, p, sizeof v);
  } else {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (__is_same(T, bf16)) v = (Vec<float>)((Vec<uint32_t>)_mm512_maskz_cvtepu16_epi32(0xffff, half) << 16);
    else v = (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, half);
#elif defined(__AVX2__)
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (__is_same(T, bf16)) v = (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
    else v = (Vec<float>)_mm256_cvtph_ps(half);
#else
    for (int i = 0; i < kLanes<float>; ++i) v[i] = to_acc(p[i]);
#endif
  }
  return v;
}

// as from_acc, lane by lane
inline void store_narrow(bf16* p, Vec<float> v) {
  typedef uint16_t Half __attribute__((vector_size(kVecBytes / 2)));
  const Vec<uint32_t> bits = (Vec<uint32_t>)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Half half = __builtin_convertvector(v == v ? rounded : Vec<uint32_t>{} + 0x7fc0u, Half);
  std::memcpy(p, &half, sizeof half);
}
inline void store_narrow(fp16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = from_acc<fp16>(v[i]);
#endif
}

template <class T> inline void store(T* p, Vec<Acc<T>> v) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) std::memcpy(p, &v, sizeof v);
  else store_narrow(p, v);
}

// The first n lanes, all of them where n is larger; the others come as 0 and are not stored.
template <class T> inline Vec<Acc<T>> load_some(const T* p, int64_t n) {
  if (n >= kLanes<Acc<T>>) return load(p);
  T lanes[kLanes<Acc<T>>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T> inline void store_some(T* p, Vec<Acc<T>> v, int64_t n) {
  if (n >= kLanes<Acc<T>>) return store(p, v);
  for (int64_t i = 0; i < n; ++i) p[i] = from_acc<T>(Acc<T>(v[i]));
}

// halves joined until one lane is left: a fixed tree, so the same bits whoever calls
template <class A, int Bytes, class V, class F> inline A join_halves(V v, const F& join) {
  if constexpr (Bytes == 2 * sizeof(A)) {
    return join(v[0], v[1]);
  } else {
    typedef A Half __attribute__((vector_size(Bytes / 2)));
    Half low, high;
    std::memcpy(&low, &v, Bytes / 2);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + Bytes / 2, Bytes / 2);
    return join_halves<A, Bytes / 2>(join(low, high), join);
  }
}
template <class A> inline A horizontal_sum(Vec<A> v) {
  return join_halves<A, kVecBytes>(v, [](auto a, auto b) { return a + b; });
}
template <class A> inline A horizontal_min(Vec<A> v) {
  return join_halves<A, kVecBytes>(v, [](auto a, auto b) { return a < b ? a : b; });
}
template <class A> inline A horizontal_max(Vec<A> v) {
  return join_halves<A, kVecBytes>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// f(begin, end) over chunks of [begin, end) on torch's own thread pool
template <class F> inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  auto call = [](int64_t b, int64_t e, void* context) { (*static_cast<const F*>(context))(b, e); };
  torch_parallel_for(begin, end, grain, call, const_cast<void*>(static_cast<const void*>(&f)));
}
inline int64_t num_threads() {
  uint32_t n = 1;
  torch_get_num_threads(&n);
  return n;
}

}  // namespace SK_ISA
}  // namespace sae_kernels
