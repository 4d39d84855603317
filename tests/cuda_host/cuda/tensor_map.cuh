// In the place of csrc/cuda/tensor_map.cuh: a matrix is where it is, and a box is copied at once.
#pragma once

#include "cuda/tensor_core.cuh"

namespace sae_kernels {

struct TensorMap {
  const uint16_t* from;
  int64_t rows, columns;
  int box_rows;
};

inline const char* map_matrix(TensorMap& to, const void* from, int64_t rows, int64_t columns, int box_rows, bool) {
  to = {static_cast<const uint16_t*>(from), rows, columns, box_rows};
  return nullptr;
}
inline void copy_box(void* to, const TensorMap& map, int row, int column, Barrier&) {
  if (threadIdx.x % kWarp != 0) return;
  for (int n = 0; n < map.box_rows; ++n)
    for (int d = 0; d < kTileDepth; ++d) {
      const bool inside = row + n < map.rows && column + d < map.columns;
      const uint16_t bits = inside ? map.from[(row + n) * map.columns + column + d] : 0;
      std::memcpy(static_cast<char*>(to) + tile_place(n, d / 8) + d % 8 * 2, &bits, 2);
    }
}

}  // namespace sae_kernels
