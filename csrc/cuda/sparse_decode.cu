// Launchers of sparse_decode and of the sums per latent; sae_kernels/cuda sorts the indices and holds the workspace.
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
  bool aligned = bytes % 16 == 0;
  for (const void* start : starts) aligned &= reinterpret_cast<uintptr_t>(start) % 16 == 0;
  return aligned;
}

template <class T, class I, int V> DecodeArgs<T, I> decode_args(const Tensor& indices, const Tensor& W) {
  return {.indices = data<I>(indices), .W = data<T>(W), .rows = indices.size(0), .d_sae = W.size(0), .d = W.size(1),
          .k = static_cast<int>(indices.size(1)), .lanes = lanes_for(W.size(1), V)};
}

}  // namespace

void decode(Tensor values, Tensor indices, Tensor W, std::optional<Tensor> bias, Tensor out) {
  const void* bias_at = bias ? bias->data_ptr() : nullptr;
  with_types(W, indices, wide_rows(W, {W.data_ptr(), bias_at, out.data_ptr()}), [&]<class T, class I, int V>() {
    auto args = decode_args<T, I, V>(indices, W);
    args.values = data<T>(values);
    args.bias = data_or_null<T>(bias);
    args.out = mutable_data<T>(out);
    const dim3 grid = grid_of(ceil_div(args.rows, kDecodeThreads / args.lanes), ceil_div(args.d, int64_t(args.lanes) * V));
    launch(decode_rows<T, I, V>, grid, kDecodeThreads, args, W);
  });
}

void decode_dots(Tensor grad, Tensor indices, Tensor W, Tensor out) {
  with_types(W, indices, wide_rows(W, {W.data_ptr(), grad.data_ptr()}), [&]<class T, class I, int V>() {
    auto args = decode_args<T, I, V>(indices, W);
    args.grad = data<T>(grad);
    args.out = mutable_data<T>(out);
    const dim3 grid = grid_of(ceil_div(args.rows, kDecodeThreads / args.lanes), ceil_div(args.k, kDots));
    launch(dot_rows<T, I, V>, grid, kDecodeThreads, args, W);
  });
}

void latent_sums(Tensor rows, Tensor weights, std::optional<Tensor> W, Tensor latents, Tensor order, std::optional<Tensor> dots,
                 Tensor sums, std::optional<Tensor> totals, Tensor slots, Tensor slot_totals, int64_t chunk) {
  const void* W_at = W ? W->data_ptr() : nullptr;
  with_types(rows, latents, wide_rows(rows, {rows.data_ptr(), W_at, sums.data_ptr()}), [&]<class T, class I, int V>() {
    const SumArgs<T, I> args{.rows = data<T>(rows), .weights = data<T>(weights), .W = data_or_null<T>(W), .latents = data<I>(latents),
                             .order = data<int64_t>(order), .dots = data_or_null<T>(dots), .sums = mutable_data<T>(sums),
                             .totals = data_or_null<T>(totals), .slots = mutable_data<Acc<T>>(slots),
                             .slot_totals = mutable_data<Acc<T>>(slot_totals), .entries = latents.numel(), .chunk = chunk,
                             .d_sae = sums.size(0), .d = sums.size(1), .k = static_cast<int>(weights.size(1)),
                             .lanes = lanes_for(sums.size(1), V)};
    STD_TORCH_CHECK(!args.W || int64_t(args.lanes) * V >= args.d, "sae_kernels: rows of more than one slice have no dots");
    const int64_t chunks = ceil_div(args.entries, chunk);
    const dim3 grid = grid_of(ceil_div(chunks, kDecodeThreads / args.lanes), ceil_div(args.d, int64_t(args.lanes) * V));
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
