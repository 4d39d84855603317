// Launchers of sparse_decode and of the sums per latent; sae_kernels/cuda sorts the indices and holds the workspace.
#include <algorithm>

#include "cuda/latent_sums.cuh"
#include "cuda/launch.h"

namespace sae_kernels {
namespace {

// Calls f<T, I, V>(): V columns per thread where rows of d begin where 16 bytes can be read, else one.
template <class F> void with_types(const Tensor& like, const Tensor& indices, bool wide, F&& f) {
  with_float_type(like.scalar_type(), [&]<class T>(T) {
    const bool narrow_index = indices.scalar_type() == ScalarType::Int;
    if (narrow_index && wide) f.template operator()<T, int32_t, kWide<T>>();
    else if (narrow_index) f.template operator()<T, int32_t, 1>();
    else if (wide) f.template operator()<T, int64_t, kWide<T>>();
    else f.template operator()<T, int64_t, 1>();
  });
}

bool wide_rows(const Tensor& W, std::initializer_list<const void*> starts) {
  const int64_t bytes = W.size(W.dim() - 1) * static_cast<int64_t>(W.element_size());
  return bytes % 16 == 0 && std::all_of(starts.begin(), starts.end(), [](const void* p) { return aligned(16, p); });
}

template <class T, class I, int V> DecodeArgs<T, I> decode_args(const Tensor& indices, const Tensor& W) {
  DecodeArgs<T, I> args{};
  args.indices = data<I>(indices);
  args.W = data<T>(W);
  args.rows = indices.size(0);
  args.d_sae = W.size(0);
  args.d = W.size(1);
  args.k = static_cast<int>(indices.size(1));
  args.lanes = lanes_for(args.d, V);
  return args;
}

// Teams of `lanes` along the grid's first side.
inline int64_t blocks(int64_t teams, int lanes) { return ceil_div(teams, kDecodeThreads / lanes); }

}  // namespace

void decode(Tensor values, Tensor indices, Tensor W, std::optional<Tensor> bias, Tensor out) {
  const void* bias_at = bias ? bias->data_ptr() : nullptr;
  with_types(W, indices, wide_rows(W, {W.data_ptr(), bias_at, out.data_ptr()}), [&]<class T, class I, int V>() {
    auto args = decode_args<T, I, V>(indices, W);
    args.values = data<T>(values);
    args.bias = data_or_null<T>(bias);
    args.out = mutable_data<T>(out);
    const dim3 grid = grid_of(blocks(args.rows, args.lanes), ceil_div(args.d, int64_t(args.lanes) * V));
    launch(decode_rows<T, I, V>, grid, kDecodeThreads, args, W);
  });
}

void decode_dots(Tensor grad, Tensor indices, Tensor W, Tensor out) {
  with_types(W, indices, wide_rows(W, {W.data_ptr(), grad.data_ptr()}), [&]<class T, class I, int V>() {
    auto args = decode_args<T, I, V>(indices, W);
    args.grad = data<T>(grad);
    args.out = mutable_data<T>(out);
    const dim3 grid = grid_of(blocks(args.rows, args.lanes), ceil_div(args.k, kDots));
    launch(dot_rows<T, I, V>, grid, kDecodeThreads, args, W);
  });
}

void latent_sums(Tensor rows, Tensor weights, std::optional<Tensor> W, Tensor latents, Tensor order,
                 std::optional<Tensor> dots, Tensor sums, std::optional<Tensor> totals, Tensor slots,
                 Tensor slot_totals, int64_t chunk) {
  const void* W_at = W ? W->data_ptr() : nullptr;
  with_types(rows, latents, wide_rows(rows, {rows.data_ptr(), W_at, sums.data_ptr()}), [&]<class T, class I, int V>() {
    SumArgs<T, I> args{};
    args.rows = data<T>(rows);
    args.weights = data<T>(weights);
    args.W = data_or_null<T>(W);
    args.latents = data<I>(latents);
    args.order = data<int64_t>(order);
    args.dots = data_or_null<T>(dots);
    args.sums = mutable_data<T>(sums);
    args.totals = data_or_null<T>(totals);
    args.slots = mutable_data<Acc<T>>(slots);
    args.slot_totals = mutable_data<Acc<T>>(slot_totals);
    args.entries = latents.numel();
    args.chunk = chunk;
    args.d_sae = sums.size(0);
    args.d = sums.size(1);
    args.k = static_cast<int>(weights.size(1));
    args.lanes = lanes_for(args.d, V);
    const int64_t slices = ceil_div(args.d, int64_t(args.lanes) * V), chunks = ceil_div(args.entries, chunk);
    STD_TORCH_CHECK(!args.W || slices == 1, "sae_kernels: rows of more than one slice have no dots");
    const dim3 grid = grid_of(blocks(chunks, args.lanes), slices);
    launch(sum_runs<T, I, V>, grid, kDecodeThreads, args, rows);
    if (chunks > 1) launch(join_runs<T, I, V>, grid, kDecodeThreads, args, rows);
  });
}

}  // namespace sae_kernels

STABLE_TORCH_LIBRARY_IMPL(sae_kernels, SK_DEVICE, m) {
  m.impl("cuda_decode", TORCH_BOX(&sae_kernels::decode));
  m.impl("cuda_decode_dots", TORCH_BOX(&sae_kernels::decode_dots));
  m.impl("cuda_latent_sums", TORCH_BOX(&sae_kernels::latent_sums));
}
