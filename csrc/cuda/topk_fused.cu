// Launcher of the encoder that writes no pre-activations; sae_kernels/cuda/topk_encode.py says when it runs.
#include "cuda/launch.h"
#include "cuda/topk_fused.cuh"
#include "cuda/topk_guess.cuh"

namespace sae_kernels {
namespace {

constexpr int kFewKeys = 3, kManyKeys = 5, kMostKeys = 9;  // a row's buffer has 32 times as many
constexpr int kFewest = 40;  // the largest k of small buffers: with more they would be full all the time

template <class T, int KC, int Keys> void launch_fused(const FusedArgs& args, int groups, const Tensor& x) {
  const bool general = Keys == kMostKeys || args.activation == kAbs || args.passed;
  const int64_t lots = ceil_div(args.rows, groups * kGroupRows);
  const int64_t blocks = general ? lots : std::min<int64_t>(lots, device_of(x).processors);
  launch(general ? topk_encode_rows<T, KC, Keys, true> : topk_encode_rows<T, KC, Keys, Keys == kMostKeys>,
         grid_of(blocks), fused_threads(groups), args, x, fused_bytes<Keys>(groups, args.stages));
}

template <class T, int KC> void launch_for_k(const FusedArgs& args, int groups, const Tensor& x) {
  if (args.k <= kFewest) launch_fused<T, KC, kFewKeys>(args, groups, x);
  else if (args.k <= kLargestFused<kManyKeys>) launch_fused<T, KC, kManyKeys>(args, groups, x);
  else launch_fused<T, KC, kMostKeys>(args, groups, x);
}

template <class T> void launch_for_depth(const FusedArgs& args, int groups, const Tensor& x) {
  if (args.d_in <= kTileDepth) launch_for_k<T, 1>(args, groups, x);
  else if (args.d_in <= 2 * kTileDepth) launch_for_k<T, 2>(args, groups, x);
  else launch_for_k<T, 4>(args, groups, x);
}

// A guess from a sample; all rows by it; those again that have less. The second and the third wait for nobody: how many
// rows there are to take stands in memory.
template <class T>
void launch_guessing(const FusedArgs& args, GuessArgs guess, int groups, const Tensor& x) {
  launch(sample_rows, grid_of(ceil_div(guess.n, kGuessThreads)), kGuessThreads, guess, x);
  FusedArgs some = args, all = args;
  some.rows = guess.n;
  some.only = guess.sample;
  some.norms = const_cast<float*>(guess.norms);
  launch_for_depth<T>(some, 1, x);
  launch(guess_from<T>, grid_of(1), kWarp, guess, x);
  all.guess = guess.guess;
  all.left = guess.sample;
  launch_for_depth<T>(all, groups, x);
  some.rows = args.rows;
  some.norms = nullptr;
  launch_for_depth<T>(some, 1, x);
}

template <class T> void encode(const FusedArgs& args, const ArrangeArgs& weights, const GuessArgs& guess, int groups,
                               const Tensor& x) {
  launch(arrange_weights<T>, grid_of(args.tiles), kArrangeThreads, weights, x);
  if (guess.n > 0) launch_guessing<T>(args, guess, groups, x);
  else launch_for_depth<T>(args, groups, x);
}

}  // namespace

void topk_encode_fused(Tensor x, Tensor W, std::optional<Tensor> bias, std::optional<Tensor> threshold,
                       std::optional<Tensor> passed, std::optional<Tensor> count, std::optional<Tensor> list,
                       std::optional<Tensor> norms, Tensor image, Tensor values, Tensor indices, int64_t activation,
                       int64_t groups, int64_t stages, int64_t sample) {
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
  args.only.size = data_or_null<int32_t>(count);
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
  GuessArgs guess{};
  if (list) {
    guess.n = static_cast<int>(norms->numel() - 1);
    guess.rows = args.rows;
    guess.k = args.k;
    guess.values = args.values;
    guess.norms = mutable_data<float>(*norms);
    guess.guess = mutable_data<float>(*norms) + guess.n;
    guess.sample = {mutable_data<int32_t>(*list), mutable_data<int32_t>(*list) + args.rows};
    const bool same = values.scalar_type() == x.scalar_type() && activation != kAbs && !passed && !count;
    STD_TORCH_CHECK(same && list->numel() == args.rows + 1 && guess.n > 0 && guess.n <= kMostGuessRows &&
                        guess.n <= args.rows && args.rows < int64_t(1) << 31,
                    "sae_kernels: no guess is made for these tensors");
  }
  if (x.scalar_type() == ScalarType::BFloat16) encode<bf16>(args, weights, guess, static_cast<int>(groups), x);
  else encode<fp16>(args, weights, guess, static_cast<int>(groups), x);
}

}  // namespace sae_kernels

STABLE_TORCH_LIBRARY_IMPL(sae_kernels, SK_DEVICE, m) {
  m.impl("cuda_topk_encode_fused", TORCH_BOX(&sae_kernels::topk_encode_fused));
}
