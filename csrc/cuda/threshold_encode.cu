// Launcher of the selection by thresholds from slabs; sae_kernels/cuda/topk_encode.py calls it chunk after chunk.
#include "cuda/slab_args.h"
#include "cuda/threshold_select.cuh"

namespace sae_kernels {
namespace {

template <class P> void launch_passing(const SelectArgs& args, bool magnitude, const Tensor& slab) {
  const auto wide = magnitude ? select_passing<P, 4, true> : select_passing<P, 4, false>;
  const auto narrow = magnitude ? select_passing<P, 1, true> : select_passing<P, 1, false>;
  launch(is_wide(args) ? wide : narrow, grid_of(ceil_div(args.rows, P::kRows)), P::kThreads, args, slab);
}

}  // namespace

void threshold_select(Tensor slab, std::optional<Tensor> bias, std::optional<Tensor> mask, Tensor threshold,
                      Tensor passed, Tensor keys, Tensor values, Tensor indices, int64_t first, bool last,
                      int64_t activation) {
  SelectArgs args = slab_args(slab, bias, mask, threshold, passed, first);
  write_to(args, keys, values, indices, first, last);
  const bool magnitude = activation == kAbs;
  if (args.k <= 64) launch_passing<ThresholdTo64>(args, magnitude, slab);
  else if (args.k <= 128) launch_passing<ThresholdTo128>(args, magnitude, slab);
  else if (args.k <= 256) launch_passing<ThresholdTo256>(args, magnitude, slab);
  else launch_passing<ThresholdTo1024>(args, magnitude, slab);
}

}  // namespace sae_kernels

STABLE_TORCH_LIBRARY_IMPL(sae_kernels, SK_DEVICE, m) {
  m.impl("cuda_threshold_select", TORCH_BOX(&sae_kernels::threshold_select));
}
