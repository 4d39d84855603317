// From tensors to launches, on torch's stable ABI: contiguous tensors on one device, the current stream of that device.
#pragma once

#include "common.h"
#include "cuda/device.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// tests/cuda_host registers the same launchers for CPU tensors
#ifndef SK_DEVICE
#define SK_DEVICE CUDA
#endif

namespace sae_kernels {

// Runs `kernel`, which takes one struct, on the current stream of `where`'s device.
template <class Args>
void launch(void (*kernel)(Args), dim3 grid, int threads, Args args, const Tensor& where) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(where.get_device_index(), &stream));
  void* arguments[] = {&args};
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernel(kernel, grid, dim3(threads), arguments, 0, on);
  STD_TORCH_CHECK(error == cudaSuccess, "sae_kernels: a CUDA kernel does not start: ", cudaGetErrorString(error));
}

inline dim3 grid_of(int64_t x, int64_t y = 1) {
  STD_TORCH_CHECK(x <= 0x7fffffff && y <= 65535, "sae_kernels: the tensors are too large for one launch");
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

template <class T>
T* data_or_null(const std::optional<Tensor>& t) { return t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr; }

inline bool aligned(size_t bytes, const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace sae_kernels
