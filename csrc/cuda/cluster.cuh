// Blocks that run side by side and reach each other's shared memory, on sm_90 and later. tests/cuda_host has a twin of
// this file, whose clusters are of one block.
#pragma once

#include "cuda/pipeline.cuh"

namespace sae_kernels {

constexpr int kClusterBlocks = 2;

__device__ __forceinline__ int block_of_cluster() {
  uint32_t number = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(number));
#endif
  return static_cast<int>(number);
}

// All threads of the cluster meet.
__device__ __forceinline__ void sync_cluster() {
  __syncwarp();
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// What stands at p in this block's shared memory, in that of another block.
__device__ __forceinline__ uint32_t address_in(const void* p, int block) {
  uint32_t address = shared_address(p);
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(block));
#endif
  return address;
}

// At the barrier of every block of the cluster.
__device__ __forceinline__ void arrive_at_all(Barrier& barrier) {
#if __CUDA_ARCH__ >= 900
#pragma unroll
  for (int block = 0; block < kClusterBlocks; ++block)
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(address_in(&barrier.state, block))
                 : "memory");
#endif
}

// A signal that rises in every block of the cluster.
struct ClusterSignal : Signal {
  __device__ __forceinline__ void raise(int to) {
#if __CUDA_ARCH__ >= 900
#pragma unroll
    for (int block = 0; block < kClusterBlocks; ++block)
      asm volatile("red.relaxed.cluster.shared::cluster.max.s32 [%0], %1;" ::"r"(address_in(&at, block)), "r"(to)
                   : "memory");
#endif
  }
};

// cudaLaunchKernel, for a grid of whole clusters.
template <class Kernel>
cudaError_t start_clusters(Kernel kernel, dim3 grid, dim3 threads, void** arguments, int bytes, cudaStream_t stream) {
  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = kClusterBlocks;
  size.val.clusterDim.y = size.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = threads, config.dynamicSmemBytes = bytes, config.stream = stream;
  config.attrs = &size, config.numAttrs = 1;
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
}

}  // namespace sae_kernels
