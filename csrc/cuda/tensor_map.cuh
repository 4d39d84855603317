// Matrices of 16-bit elements as the copy engine of sm_90 and later takes boxes of them, 64 columns wide, laid out as
// in tile_place; what lies outside is 0. tests/cuda_host has a twin of this file.
#pragma once

#include <cuda.h>

#include "cuda/tensor_core.cuh"

namespace sae_kernels {

struct TensorMap { CUtensorMap map; };

// Of [rows, columns], columns a multiple of 8, at a multiple of 16 bytes; null, or why there is none.
inline const char* map_matrix(TensorMap& to, const void* from, int64_t rows, int64_t columns, int box_rows,
                              bool is_bf16) {
  static void* const found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult status;
    const char* name = "cuTensorMapEncodeTiled";
    const auto done = cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &status);
    return done == cudaSuccess && status == cudaDriverEntryPointSuccess ? entry : nullptr;
  }();
  if (!found) return "the driver has no tensor maps";
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(columns) * 2};
  const cuuint32_t box[2] = {kTileDepth, cuuint32_t(box_rows)}, steps[2] = {1, 1};
  const CUresult done = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)(
      &to.map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(from),
      sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return done == CUDA_SUCCESS ? nullptr : "the driver refuses a tensor map";
}

// The box at that row and column; begin_fill has announced all its bytes, outside ones too.
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, int row, int column, Barrier& full) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x % kWarp == 0)
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
                 "[%4];" ::"r"(shared_address(to)), "l"(&map.map), "r"(column), "r"(row),
                 "r"(shared_address(&full.state)) : "memory");
#endif
}

}  // namespace sae_kernels
