// The shared memory whose size a launch says.
#pragma once

namespace sae_kernels {

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char pool[];
  return pool;
}

}  // namespace sae_kernels
