// Launcher of the encoder that writes no pre-activations; sae_kernels/cuda/topk_encode.py says when it runs.
#include "cuda/launch.h"
#include "cuda/topk_fused.cuh"

namespace sae_kernels {
namespace {

constexpr int kFewKeys = 3, kManyKeys = 5, kMostKeys = 9;  // a row's buffer has 32 times as many
constexpr int kFewest = 40;  // the largest k of small buffers: with more they would be full all the time

template <class T, int KC, int Keys> void launch_fused(const FusedArgs& args, int groups, const Tensor& x) {
  const bool general = Keys == kMostKeys || args.activation == kAbs || args.passed;
  launch(general ? topk_encode_rows<T, KC, Keys, true> : topk_encode_rows<T, KC, Keys, Keys == kMostKeys>,
         grid_of(ceil_div(args.rows, int64_t(groups) * kGroupRows)), fused_threads(groups), args, x,
         fused_bytes<Keys>(groups, args.stages));
}

template <class T, int KC> void launch_for_k(const FusedArgs& args, int groups, const Tensor& x) {
  if (args.k <= kFewest) launch_fused<T, KC, kFewKeys>(args, groups, x);
  else if (args.k <= kLargestFused<kManyKeys>) launch_fused<T, KC, kManyKeys>(args, groups, x);
  else launch_fused<T, KC, kMostKeys>(args, groups, x);
}

template <class T>
void launch_for_depth(const FusedArgs& args, const ArrangeArgs& weights, int groups, const Tensor& x) {
  launch(arrange_weights<T>, grid_of(args.tiles), kArrangeThreads, weights, x);
  if (weights.chunks == 1) launch_for_k<T, 1>(args, groups, x);
  else if (weights.chunks == 2) launch_for_k<T, 2>(args, groups, x);
  else launch_for_k<T, 4>(args, groups, x);
}

}  // namespace

void topk_encode_fused(Tensor x, Tensor W, std::optional<Tensor> bias, std::optional<Tensor> threshold,
                       std::optional<Tensor> passed, std::optional<Tensor> needed, Tensor image, Tensor values,
                       Tensor indices, int64_t activation, int64_t groups, int64_t stages, int64_t sample) {
  ArrangeArgs weights{};
  weights.W = W.const_data_ptr();
  weights.bias = data_or_null<float>(bias);
  weights.threshold = data_or_null<float>(threshold);
  weights.threshold_step = threshold && threshold->size(0) > 1 ? 1 : 0;
  weights.image = mutable_data<uint8_t>(image);
  weights.d_sae = W.size(0);
  weights.d_in = W.size(1);
  weights.chunks = weights.d_in <= kTileDepth ? 1 : weights.d_in <= 2 * kTileDepth ? 2 : 4;
  weights.beyond = activation == kNone ? -__builtin_huge_valf() : 0.0f;
  FusedArgs args{};
  args.x = x.const_data_ptr();
  args.image = weights.image;
  args.passed = data_or_null<int32_t>(passed);
  args.needed = data_or_null<int32_t>(needed);
  args.values = values.mutable_data_ptr();
  args.indices = mutable_data<int32_t>(indices);
  args.rows = x.size(0);
  args.d_in = static_cast<int>(x.size(1));
  args.d_sae = static_cast<int>(W.size(0));
  args.tiles = 2 * static_cast<int>(ceil_div(args.d_sae, 2 * kTileLatents));
  args.k = static_cast<int>(values.size(1));
  args.activation = static_cast<int>(activation);
  args.stages = static_cast<int>(stages);
  args.sample = static_cast<int>(sample);
  args.stride = sample > 0 ? args.tiles / args.sample : 1;
  args.dtype = out_of(values);
  const bool fits = args.d_in % 2 == 0 && args.d_in <= 4 * kTileDepth && args.k <= kLargestFused<kMostKeys> &&
                    sample % 2 == 0 && sample <= args.tiles && stages >= kFewestStages && aligned(4, args.x) &&
                    aligned(16, args.image) && image.numel() >= args.tiles * image_bytes(weights.chunks);
  const bool counts = threshold.has_value() && args.tiles * (kTileLatents / 4) < 1 << 16;  // see RowState
  STD_TORCH_CHECK(fits && counts == passed.has_value(),
                  "sae_kernels: these tensors do not fit the fused encoder");
  if (x.scalar_type() == ScalarType::BFloat16) launch_for_depth<bf16>(args, weights, groups, x);
  else launch_for_depth<fp16>(args, weights, groups, x);
}

}  // namespace sae_kernels

STABLE_TORCH_LIBRARY_IMPL(sae_kernels, SK_DEVICE, m) {
  m.impl("cuda_topk_encode_fused", TORCH_BOX(&sae_kernels::topk_encode_fused));
}
