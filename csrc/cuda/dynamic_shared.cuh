// The shared memory whose size a launch says, and a look at it without order: another thread may be writing by an
// atomic.
#pragma once

namespace sae_kernels {

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char pool[];
  return pool;
}

template <class N> __device__ __forceinline__ N look(const N* at) { return *const_cast<const volatile N*>(at); }

}  // namespace sae_kernels
