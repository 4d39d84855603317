// Launcher of the encoder of long rows; sae_kernels/cuda/topk_encode.py says when it runs.
#include "cuda/launch.h"
#include "cuda/topk_panels.cuh"

namespace sae_kernels {

void encode_panels(Tensor x, Tensor W, Tensor lines, Tensor pool, Tensor keys, int64_t activation,
                         int64_t strip_tiles) {
  const int64_t rows = x.size(0), d_in = x.size(1), d_sae = W.size(0);
  PanelArgs args{};
  args.lines = static_cast<const unsigned char*>(lines.const_data_ptr());
  args.pool = mutable_data<uint8_t>(pool);
  args.keys = mutable_data<uint64_t>(keys);
  args.rows = rows;
  args.d_sae = static_cast<int>(d_sae);
  args.k = static_cast<int>(keys.size(2));
  args.activation = static_cast<int>(activation);
  args.depth = static_cast<int>(ceil_div(d_in, kTileDepth));
  args.tiles = static_cast<int>(ceil_div(d_sae, kWideLatents));
  args.strips = static_cast<int>(keys.size(1));
  args.strip_tiles = static_cast<int>(strip_tiles);
  args.items = static_cast<int>(ceil_div(rows, kPanelRows) * args.strips);
  const int64_t blocks = std::min<int64_t>(args.items, pool.numel() / kPoolBytes);
  const bool fits = d_in > 0 && d_in % 8 == 0 && args.k <= kLargestFused<kPanelKeys> && activation != kAbs &&
                    aligned(16, x.const_data_ptr()) && aligned(16, W.const_data_ptr()) && aligned(16, args.lines);
  STD_TORCH_CHECK(fits && blocks > 0 && keys.size(0) == rows && lines.scalar_type() == x.scalar_type() &&
                      lines.numel() == int64_t(args.tiles) * kWideLatents * kLinePitch / 2 &&
                      args.strips == ceil_div(args.tiles, args.strip_tiles),
                  "sae_kernels: these tensors do not fit the encoder of panels");
  const bool is_bf16 = x.scalar_type() == ScalarType::BFloat16;
  for (const char* error : {map_matrix(args.x, x.const_data_ptr(), rows, d_in, kPanelRows, is_bf16),
                            map_matrix(args.W, W.const_data_ptr(), d_sae, d_in, kWideLatents, is_bf16)})
    STD_TORCH_CHECK(error == nullptr, "sae_kernels: ", error ? error : "");
  launch(is_bf16 ? topk_encode_panels<bf16> : topk_encode_panels<fp16>, grid_of(blocks), kPanelThreads, args, x,
         kPanelBytes);
}

template <int Best> auto merge_of(int n) {
  return n <= 4 * kWarp    ? merge_strips<4, Best>
         : n <= 8 * kWarp  ? merge_strips<8, Best>
         : n <= 16 * kWarp ? merge_strips<16, Best>
                           : merge_strips<0, 1>;
}

void merge_keys(Tensor keys, Tensor values, Tensor indices) {
  MergeArgs args{};
  args.keys = mutable_data<uint64_t>(keys);
  args.values = values.mutable_data_ptr();
  args.indices = mutable_data<int32_t>(indices);
  args.rows = keys.size(0);
  args.n = static_cast<int>(keys.size(1) * keys.size(2));
  args.k = static_cast<int>(values.size(1));
  args.dtype = out_of(values);
  for (args.room = 2; args.room < args.n;) args.room *= 2;
  STD_TORCH_CHECK(args.n <= kLargestMerge, "sae_kernels: too many keys to merge");
  const auto kernel = args.k <= 2 * kWarp   ? merge_of<2>(args.n)
                      : args.k <= 4 * kWarp ? merge_of<4>(args.n)
                                            : merge_strips<0, 1>;
  launch(kernel, grid_of(ceil_div(args.rows, kMergeRows)), kMergeRows * kWarp, args, keys,
         int64_t(kMergeRows) * args.room * sizeof(uint64_t));
}

}  // namespace sae_kernels

STABLE_TORCH_LIBRARY_IMPL(sae_kernels, SK_DEVICE, m) {
  m.impl("cuda_topk_encode_panels", TORCH_BOX(&sae_kernels::encode_panels));
  m.impl("cuda_topk_merge", TORCH_BOX(&sae_kernels::merge_keys));
}
