// Copies from global to shared memory that run by themselves, and the barriers that tell when they are there.
// tests/cuda_host has a twin of this file.
#pragma once

#include "cuda/device.cuh"

namespace sae_kernels {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// In shared memory: a phase ends when as many arrivals as `init` said have come; the next one begins at once.
struct Barrier {
  uint64_t state;

  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&state)), "r"(arrivals) : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("{ .reg .b64 token; mbarrier.arrive.shared.b64 token, [%0]; }" ::"r"(shared_address(&state)) : "memory");
  }
  // Until the phase of this parity has ended; the first phase has parity 0.
  __device__ __forceinline__ void wait(int parity) {
    const uint32_t at = shared_address(&state);
    uint32_t ended = 0;
    while (!ended) {
#if __CUDA_ARCH__ >= 900
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(ended) : "r"(at), "r"(parity) : "memory");
#else
      asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(ended) : "r"(at), "r"(parity) : "memory");
#endif
    }
  }
};

// 16 bytes; zeros where `inside` is false.
__device__ __forceinline__ void copy_16(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0) : "memory");
}

// Copies are counted in groups: those of a thread since its last call.
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last N groups of this thread are there, also for tensor cores that read shared memory by themselves.
template <int N> __device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace sae_kernels
