// Launcher of the encoder that writes no pre-activations; sae_kernels/cuda/topk_encode.py says when it runs.
#include "cuda/launch.h"
#include "cuda/topk_fused.cuh"

namespace sae_kernels {
namespace {

constexpr int kFewKeys = 3, kManyKeys = 5;  // per lane, of a row's buffer

template <class T, int KC, int Keys> void launch_fused(const FusedArgs& args, int groups, const Tensor& x) {
  const bool general = args.activation == kAbs || args.threshold;
  launch(general ? topk_encode_rows<T, KC, Keys, true> : topk_encode_rows<T, KC, Keys, false>,
         grid_of(ceil_div(args.rows, int64_t(groups) * kGroupRows)), fused_threads(groups), args, x,
         fused_bytes<Keys>(groups, args.stages));
}

template <class T, int KC> void launch_for_k(const FusedArgs& args, int groups, const Tensor& x) {
  if (args.k <= kLargestFused<kFewKeys>) launch_fused<T, KC, kFewKeys>(args, groups, x);
  else launch_fused<T, KC, kManyKeys>(args, groups, x);
}

template <class T> void launch_for_depth(const FusedArgs& args, int groups, const Tensor& x) {
  if (args.d_in <= kTileDepth) launch_for_k<T, 1>(args, groups, x);
  else if (args.d_in <= 2 * kTileDepth) launch_for_k<T, 2>(args, groups, x);
  else launch_for_k<T, 4>(args, groups, x);
}

}  // namespace

void topk_encode_fused(Tensor x, Tensor W, std::optional<Tensor> bias, std::optional<Tensor> threshold,
                       std::optional<Tensor> passed, Tensor values, Tensor indices, int64_t activation, int64_t groups,
                       int64_t stages, int64_t sample) {
  FusedArgs args{};
  args.x = x.const_data_ptr();
  args.W = W.const_data_ptr();
  args.bias = data_or_null<float>(bias);
  args.threshold = data_or_null<float>(threshold);
  args.threshold_step = threshold && threshold->size(0) > 1 ? 1 : 0;
  args.passed = data_or_null<int32_t>(passed);
  args.values = values.mutable_data_ptr();
  args.indices = mutable_data<int32_t>(indices);
  args.rows = x.size(0);
  args.d_in = static_cast<int>(x.size(1));
  args.tiles = static_cast<int>(W.size(0) / kTileLatents);
  args.k = static_cast<int>(values.size(1));
  args.activation = static_cast<int>(activation);
  args.stages = static_cast<int>(stages);
  args.sample = static_cast<int>(sample);
  args.stride = sample > 0 ? args.tiles / args.sample : 1;
  args.dtype = out_of(values);
  STD_TORCH_CHECK(args.d_in % 8 == 0 && args.d_in <= 4 * kTileDepth && W.size(0) % kTileLatents == 0 &&
                      args.k <= kLargestFused<kManyKeys> && aligned(16, args.x) && aligned(16, args.W) &&
                      aligned(16, args.bias),
                  "sae_kernels: these tensors do not fit the fused encoder");
  if (x.scalar_type() == ScalarType::BFloat16) launch_for_depth<bf16>(args, groups, x);
  else launch_for_depth<fp16>(args, groups, x);
}

}  // namespace sae_kernels

STABLE_TORCH_LIBRARY_IMPL(sae_kernels, SK_DEVICE, m) {
  m.impl("cuda_topk_encode_fused", TORCH_BOX(&sae_kernels::topk_encode_fused));
}
