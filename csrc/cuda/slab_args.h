// What the launchers of the selections from slabs have in common.
#pragma once

#include "cuda/launch.h"
#include "cuda/topk_slab.cuh"

namespace sae_kernels {

// threshold and passed: both or neither. The caller adds where the results go.
inline SelectArgs slab_args(const Tensor& slab, const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
                            const std::optional<Tensor>& threshold, const std::optional<Tensor>& passed,
                            int64_t first) {
  SelectArgs args{};
  args.slab = data<float>(slab);
  args.bias = data_or_null<float>(bias);
  args.mask = data_or_null<uint8_t>(mask);
  args.threshold = data_or_null<float>(threshold);
  args.threshold_step = threshold && threshold->size(0) > 1 ? 1 : 0;
  args.passed = data_or_null<int32_t>(passed);
  args.rows = slab.size(0);
  args.stride = slab.stride(0);
  args.columns = static_cast<int>(slab.size(1));
  args.first = static_cast<int>(first);
  return args;
}

// first: latents before this chunk; last: none come after it.
inline void write_to(SelectArgs& args, const Tensor& keys, const Tensor& values, const Tensor& indices, int64_t first,
                     bool last) {
  args.keys = mutable_data<uint64_t>(keys);
  args.values = values.mutable_data_ptr();
  args.indices = mutable_data<int32_t>(indices);
  args.k = static_cast<int>(values.size(1));
  args.filled = first > 0;
  args.last = last;
  args.dtype = out_of(values);
  STD_TORCH_CHECK(args.k <= kLargestSelect, "sae_kernels: k is beyond the buffers of the selection");
}

// Whether four latents can be read at once.
inline bool is_wide(const SelectArgs& args) {
  const bool whole = args.columns % 4 == 0 && args.first % 4 == 0 && args.stride % 4 == 0;
  return whole && aligned(16, args.slab) && aligned(16, args.bias) && aligned(16, args.threshold) &&
         aligned(4, args.mask);
}

}  // namespace sae_kernels
