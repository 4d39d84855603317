// A product on the tensor cores of sm_90a alone: 64 rows of a warpgroup times 256 latents, both in shared memory. Of
// the four accumulators, the i-th has latents 64 i on and lies as in tensor_core.cuh. tests/cuda_host has a twin.
#pragma once

#include "cuda/tensor_core.cuh"

namespace sae_kernels {

#define SK_HAS_WIDE SK_WGMMA

#if SK_WGMMA
#define SK_ACCS_4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SK_ACCS_16(c, i) SK_ACCS_4(c, i), SK_ACCS_4(c, i + 4), SK_ACCS_4(c, i + 8), SK_ACCS_4(c, i + 12)
#define SK_ACCS(c) SK_ACCS_16(c, 0), SK_ACCS_16(c, 16)
template <class T> struct WideMma;
#define SK_WIDE(T, NAME)                                                                                              \
  template <> struct WideMma<T> {                                                                                     \
    static __device__ __forceinline__ void group(float (&c)[4][kAccs], uint64_t a, uint64_t b, int add) {             \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %130, 0;\n"                                                        \
                   "wgmma.mma_async.sync.aligned.m64n256k16.f32." NAME "." NAME " "                                   \
                   "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                                          \
                   "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"                                 \
                   "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                                 \
                   "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"                                 \
                   "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"                                 \
                   "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"                                 \
                   "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"                     \
                   "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, "               \
                   "%128, %129, p, 1, 1, 0, 0; }"                                                                     \
                   : SK_ACCS(c[0]), SK_ACCS(c[1]), SK_ACCS(c[2]), SK_ACCS(c[3])                                       \
                   : "l"(a), "l"(b), "r"(add));                                                                       \
    }                                                                                                                 \
  };
SK_WIDE(bf16, "bf16")
SK_WIDE(fp16, "f16")
#undef SK_WIDE
#undef SK_ACCS
#undef SK_ACCS_16
#undef SK_ACCS_4
#endif

// Adds 64 elements of depth, x [64, 64] times latents [256, 64], each as it stands in a tile; the first of a product's
// begins anew. What it is given belongs to the product until await_products.
template <class T> __device__ __forceinline__ void multiply_wide(float (&acc)[4][kAccs], const unsigned char* x,
                                                                 const unsigned char* latents, bool first) {
#if SK_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int step = 0; step < 4; ++step)
    WideMma<T>::group(acc, matrix_at(x) + 2 * step, matrix_at(latents) + 2 * step, !first || step > 0);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// The same for one element of depth: biases times ones.
template <class T> __device__ __forceinline__ void add_wide(float (&acc)[4][kAccs], Line ones, Line biases) {
#if SK_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  WideMma<T>::group(acc, matrix_at(ones), matrix_at(biases), 1);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

}  // namespace sae_kernels
