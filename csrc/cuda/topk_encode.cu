// Launchers of the selection: sae_kernels/cuda/topk_encode.py makes the products and calls them chunk after chunk.
#include "cuda/slab_args.h"
#include "cuda/topk_select.cuh"

namespace sae_kernels {
namespace {

template <class F> void with_activation(int64_t activation, F&& f) {
  if (activation == kRelu) f.template operator()<kRelu>();
  else if (activation == kNone) f.template operator()<kNone>();
  else f.template operator()<kAbs>();
}

template <class P> void launch_select(const SelectArgs& args, int64_t activation, const Tensor& slab) {
  with_activation(activation, [&]<int Act>() {
    const auto kernel = is_wide(args) ? select_rows<P, 4, Act> : select_rows<P, 1, Act>;
    launch(kernel, grid_of(ceil_div(args.rows, P::kRows)), P::kThreads, args, slab);
  });
}

}  // namespace

void topk_select(Tensor slab, std::optional<Tensor> bias, std::optional<Tensor> mask, Tensor keys, Tensor values,
                 Tensor indices, Tensor trims, int64_t first, bool last, int64_t activation) {
  SelectArgs args = slab_args(slab, bias, mask, std::nullopt, std::nullopt, first);
  write_to(args, keys, values, indices, first, last);
  args.trims = mutable_data<int32_t>(trims);
  if (args.k <= 32) launch_select<SelectTo32>(args, activation, slab);
  else if (args.k <= 64) launch_select<SelectTo64>(args, activation, slab);
  else if (args.k <= 128) launch_select<SelectTo128>(args, activation, slab);
  else launch_select<SelectTo1024>(args, activation, slab);
}

void topk_write_keys(Tensor slab, std::optional<Tensor> bias, std::optional<Tensor> mask,
                     std::optional<Tensor> threshold, std::optional<Tensor> passed, Tensor keys, int64_t activation) {
  SelectArgs args = slab_args(slab, bias, mask, threshold, passed, 0);
  args.keys = mutable_data<uint64_t>(keys);
  const dim3 grid = grid_of(ceil_div(args.columns, kElementThreads), std::min<int64_t>(args.rows, 65535));
  with_activation(activation, [&]<int Act>() {
    launch(args.threshold ? write_keys<Act, true> : write_keys<Act, false>, grid, kElementThreads, args, slab);
  });
}

void topk_write_codes(Tensor keys, Tensor values, Tensor indices, int64_t activation) {
  SelectArgs args{};
  args.keys = mutable_data<uint64_t>(keys);
  args.values = values.mutable_data_ptr();
  args.indices = mutable_data<int32_t>(indices);
  args.rows = values.size(0);
  args.k = static_cast<int>(values.size(1));
  args.dtype = out_of(values);
  const dim3 grid = grid_of(ceil_div(args.rows * args.k, kElementThreads));
  with_activation(activation, [&]<int Act>() { launch(write_codes<Act>, grid, kElementThreads, args, keys); });
}

}  // namespace sae_kernels

STABLE_TORCH_LIBRARY_IMPL(sae_kernels, SK_DEVICE, m) {
  m.impl("cuda_topk_select", TORCH_BOX(&sae_kernels::topk_select));
  m.impl("cuda_topk_write_keys", TORCH_BOX(&sae_kernels::topk_write_keys));
  m.impl("cuda_topk_write_codes", TORCH_BOX(&sae_kernels::topk_write_codes));
}
