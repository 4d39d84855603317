#include "cpu/isa.h"

#ifdef SK_BASELINE
namespace sae_kernels {
namespace {

Isa best() {
#if defined(SK_HAVE_AVX512)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return kAvx512Bf16;
  return avx512 ? kAvx512 : avx2 ? kAvx2 : kGeneric;
#else
  return kGeneric;
#endif
}

Isa chosen = best();

}  // namespace

Isa cpu_isa() { return chosen; }

}  // namespace sae_kernels

// -2 asks, -1 returns to the best, 0 to 3 force one. Returns the set in force, or -1 where the CPU lacks the one asked for.
extern "C" __attribute__((visibility("default"))) int sae_kernels_cpu_isa(int request) {
  using namespace sae_kernels;
  if (request > best()) return -1;
  if (request >= -1) chosen = request < 0 ? best() : static_cast<Isa>(request);
  return chosen;
}
#endif
