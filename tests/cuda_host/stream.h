// The one call of torch's CUDA shim that the launchers make, for a torch without CUDA.
#pragma once

#include <cstdint>

inline int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
