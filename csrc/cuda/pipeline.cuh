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
    const uint32_t at = shared_address(&state);
    asm volatile("{ .reg .b64 token; mbarrier.arrive.shared.b64 token, [%0]; }" ::"r"(at) : "memory");
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

// One warp fills a piece of shared memory: begin_fill, copies, end_fill; `full` then gets kFillers arrivals as soon as
// all is there, also for tensor cores that read shared memory by themselves. Addresses and bytes are multiples of 16.
#if __CUDA_ARCH__ >= 900
constexpr int kFillers = 1;
__device__ __forceinline__ void begin_fill(Barrier& full, int bytes) {
  if (threadIdx.x % kWarp == 0)
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(&full.state)), "r"(bytes)
                 : "memory");
  __syncwarp();
}
__device__ __forceinline__ void copy(void* to, const void* from, int bytes, Barrier& full) {
  if (threadIdx.x % kWarp == 0)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes),
                 "r"(shared_address(&full.state)) : "memory");
}
__device__ __forceinline__ void end_fill(Barrier&) {}
#else
constexpr int kFillers = kWarp;
__device__ __forceinline__ void begin_fill(Barrier&, int) {}
__device__ __forceinline__ void copy(void* to, const void* from, int bytes, Barrier&) {
  for (int at = 16 * (threadIdx.x % kWarp); at < bytes; at += 16 * kWarp)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(static_cast<char*>(to) + at)),
                 "l"(static_cast<const char*>(from) + at) : "memory");
}
__device__ __forceinline__ void end_fill(Barrier& full) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&full.state)) : "memory");
}
#endif

// A number in shared memory that only rises, for hints: when a warp sees what others say does not matter.
struct Signal {
  int at;

  __device__ __forceinline__ int read() const { return *static_cast<const volatile int*>(&at); }
  __device__ __forceinline__ void raise(int to) { atomicMax(&at, to); }
};

// After `init`, before the barrier of the block that lets others see it.
__device__ __forceinline__ void show_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace sae_kernels
