// In the place of csrc/cuda/dynamic_shared.cuh: the storage that cuda_host::run holds for the block.
#pragma once

namespace sae_kernels {

inline unsigned char* dynamic_shared() { return cuda_host::dynamic_storage; }

template <class N> N look(const N* at) {
  return std::atomic_ref<N>(*const_cast<N*>(at)).load(std::memory_order_relaxed);
}

}  // namespace sae_kernels
