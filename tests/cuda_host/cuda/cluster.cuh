// In the place of csrc/cuda/cluster.cuh: clusters of one block.
#pragma once

#include "cuda/pipeline.cuh"

namespace sae_kernels {

constexpr int kClusterBlocks = 1;

inline int block_of_cluster() { return 0; }
inline void sync_cluster() { __syncthreads(); }
inline void arrive_at_all(Barrier& barrier) { barrier.arrive(); }
struct ClusterSignal : Signal {};

template <class Kernel>
cudaError_t start_clusters(Kernel kernel, dim3 grid, dim3 threads, void** arguments, int bytes, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, threads, arguments, bytes, stream);
}

}  // namespace sae_kernels
