// Runs CUDA kernels on the CPU, to check them: this header stands in for CUDA's own where g++ compiles csrc/cuda.
//
// Blocks run in turn; a block has one OS thread per CUDA thread. __syncthreads is a std::barrier, every warp has one of
// its own through which shuffles and votes go, __shared__ is static storage, atomics are std::atomic_ref. So
// ThreadSanitizer sees a missing barrier as a data race and AddressSanitizer sees a stray access. What ends a run at
// once: lanes of a warp that meet in different collectives, and masks other than the whole warp.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
using std::max;
using std::min;

namespace cuda_host {

constexpr unsigned kLanes = 32;

struct Warp {
  std::barrier<> barrier{kLanes};
  uint64_t slots[kLanes];
  const char* calls[kLanes];
};
struct Block {
  explicit Block(unsigned threads) : barrier(threads), warps(threads / kLanes) {
    for (auto& warp : warps) warp = std::make_unique<Warp>();
  }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::atomic<int> votes[2] = {};
};
inline thread_local Block* block;
inline thread_local Warp* warp;
inline thread_local unsigned lane;
inline unsigned char* dynamic_storage;
inline thread_local unsigned turn;  // which of the two counters of votes is in use

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_host: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

// Every lane of the warp leaves a value; `read` then sees all of them.
template <class T, class F> auto collective(const char* name, unsigned mask, T value, F&& read) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) fail("only whole warps may meet");
  warp->slots[lane] = 0;
  std::memcpy(&warp->slots[lane], &value, sizeof value);
  warp->calls[lane] = name;
  warp->barrier.arrive_and_wait();
  for (const char* other : warp->calls)
    if (std::strcmp(other, name) != 0) fail("the lanes of a warp meet in different collectives");
  const auto result = read([](unsigned from) {
    T other;
    std::memcpy(&other, &warp->slots[from], sizeof other);
    return other;
  });
  warp->barrier.arrive_and_wait();
  return result;
}

template <class A> void run(void (*kernel)(A), dim3 grid, dim3 threads, A args, size_t shared_bytes = 0) {
  if (threads.x % kLanes != 0 || threads.x > 1024 || threads.y != 1 || threads.z != 1) fail("an unfit block");
  blockDim = threads;
  gridDim = grid;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      Block state(threads.x);
      std::vector<unsigned char> storage(shared_bytes, 0xa5);
      dynamic_storage = storage.data();
      std::vector<std::jthread> pool;
      for (unsigned t = 0; t < threads.x; ++t)
        pool.emplace_back([&, t] {
          threadIdx = {t};
          blockIdx = {x, y};
          block = &state;
          warp = state.warps[t / kLanes].get();
          lane = t % kLanes;
          turn = 0;
          kernel(args);
          state.barrier.arrive_and_drop();  // a thread that has left holds nobody up
        });
    }
}

}  // namespace cuda_host

inline void __syncthreads() { cuda_host::block->barrier.arrive_and_wait(); }
inline int __syncthreads_or(int x) {
  auto& votes = cuda_host::block->votes[cuda_host::turn];
  cuda_host::turn ^= 1;
  if (x) votes = 1;
  __syncthreads();
  const int any = votes;
  __syncthreads();
  if (threadIdx.x == 0) votes = 0;  // it is used again after one more barrier
  return any;
}
inline void __syncwarp() {
  cuda_host::collective("__syncwarp", 0xffffffffu, 0, [](auto) { return 0; });
}
template <class T> T __shfl_sync(unsigned mask, T value, int from) {
  return cuda_host::collective("__shfl_sync", mask, value, [&](auto lane) { return lane(from); });
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int step) {
  return cuda_host::collective("__shfl_xor_sync", mask, value, [&](auto lane) { return lane(cuda_host::lane ^ step); });
}
inline unsigned __ballot_sync(unsigned mask, int x) {
  return cuda_host::collective("__ballot_sync", mask, x, [](auto lane) {
    unsigned votes = 0;
    for (unsigned i = 0; i < cuda_host::kLanes; ++i) votes |= unsigned(lane(i) != 0) << i;
    return votes;
  });
}
inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
inline int __all_sync(unsigned mask, int x) { return __ballot_sync(mask, x) == 0xffffffffu; }
inline int __reduce_add_sync(unsigned mask, int x) {
  return cuda_host::collective("__reduce_add_sync", mask, x, [](auto lane) {
    int sum = 0;
    for (unsigned i = 0; i < cuda_host::kLanes; ++i) sum += lane(i);
    return sum;
  });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned x) {
  return cuda_host::collective("__reduce_max_sync", mask, x, [](auto lane) {
    unsigned most = 0;
    for (unsigned i = 0; i < cuda_host::kLanes; ++i) most = std::max(most, lane(i));
    return most;
  });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned x) {
  return cuda_host::collective("__reduce_or_sync", mask, x, [](auto lane) {
    unsigned all = 0;
    for (unsigned i = 0; i < cuda_host::kLanes; ++i) all |= lane(i);
    return all;
  });
}
template <class T> T atomicAdd(T* at, T value) {
  return std::atomic_ref<T>(*at).fetch_add(value, std::memory_order_relaxed);
}
template <class T> T atomicOr(T* at, T value) {
  return std::atomic_ref<T>(*at).fetch_or(value, std::memory_order_relaxed);
}

// Runs change(value) on *at until nobody comes between.
template <class T, class F> T atomic_change(T* at, F&& change) {
  std::atomic_ref<T> cell(*at);
  T before = cell.load(std::memory_order_relaxed);
  while (!cell.compare_exchange_weak(before, change(before), std::memory_order_relaxed)) {}
  return before;
}
template <class T> T atomicMax(T* at, T value) {
  return atomic_change(at, [&](T before) { return std::max(before, value); });
}
template <class T> T atomicMin(T* at, T value) {
  return atomic_change(at, [&](T before) { return std::min(before, value); });
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(unsigned x) { return x ? std::countr_zero(x) + 1 : 0; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// Kernels take one argument, a struct.
template <class A>
cudaError_t cudaLaunchKernel(void (*kernel)(A), dim3 grid, dim3 threads, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  cuda_host::run(kernel, grid, threads, *static_cast<A*>(arguments[0]), shared_bytes);
  return cudaSuccess;
}

// A device so small that a table of statistics does not hold all latents of a test.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : 8192 + 48 * 32;
  return cudaSuccess;
}
template <class F> cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) { return cudaSuccess; }
