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

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "sae_kernels: ", what, ": ", cudaGetErrorString(error));
}

struct Device { int processors, shared_bytes; };  // shared_bytes: the most that a block may ask for

inline Device device_of(const Tensor& t) {
  Device device{};
  const int number = t.get_device_index();
  const auto ask = [&](int* value, cudaDeviceAttr what) {
    check(cudaDeviceGetAttribute(value, what, number), "the device does not answer");
  };
  ask(&device.processors, cudaDevAttrMultiProcessorCount);
  ask(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return device;
}

// Runs `kernel`, which takes one struct, on the current stream of `where`'s device; shared_bytes: of dynamic_shared().
template <class Args>
void launch(void (*kernel)(Args), dim3 grid, int threads, Args args, const Tensor& where, int64_t shared_bytes = 0) {
  const int bytes = static_cast<int>(shared_bytes);
  constexpr auto kMost = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (bytes > 0) check(cudaFuncSetAttribute(kernel, kMost, bytes), "a CUDA kernel does not fit");
  void* stream = nullptr;
  const bool found = aoti_torch_get_current_cuda_stream(where.get_device_index(), &stream) == AOTI_TORCH_SUCCESS;
  STD_TORCH_CHECK(found, "sae_kernels: the tensors' device has no current stream");
  void* arguments[] = {&args};
  const auto on = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernel(kernel, grid, dim3(threads), arguments, bytes, on), "a CUDA kernel does not start");
}

inline dim3 grid_of(int64_t x, int64_t y = 1) {
  STD_TORCH_CHECK(x <= 0x7fffffff && y <= 65535, "sae_kernels: the tensors are too large for one launch");
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

template <class T>
T* data_or_null(const std::optional<Tensor>& t) { return t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr; }

inline Out out_of(const Tensor& values) {
  switch (values.scalar_type()) {
    case ScalarType::Float: return Out::kFloat;
    case ScalarType::BFloat16: return Out::kBFloat16;
    case ScalarType::Half: return Out::kHalf;
    default: STD_TORCH_CHECK(false, "sae_kernels: values must be float32, bfloat16 or float16");
  }
}

inline bool aligned(size_t bytes, const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace sae_kernels
