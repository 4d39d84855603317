// Which instruction set runs, and the raw 16-bit storage types with their accumulators. Free of torch.
#pragma once

#include <cstdint>

namespace sae_kernels {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// accumulator type: double for double, float for anything narrower
template <class T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
template <class T> using Acc = typename AccOf<T>::type;

enum Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };  // the last runs avx512's code, pairs of bf16 as such
Isa cpu_isa();

}  // namespace sae_kernels

#if defined(SK_HAVE_AVX512)
#define SK_DISPATCH(f, ...)                                                    \
  (cpu_isa() >= kAvx512 ? avx512::f(__VA_ARGS__)                               \
                        : cpu_isa() == kAvx2 ? avx2::f(__VA_ARGS__) : generic::f(__VA_ARGS__))
#define SK_DECLARE(declaration)        \
  namespace generic { declaration; }   \
  namespace avx2 { declaration; }      \
  namespace avx512 { declaration; }
#else
#define SK_DISPATCH(f, ...) generic::f(__VA_ARGS__)
#define SK_DECLARE(declaration) \
  namespace generic { declaration; }
#endif
