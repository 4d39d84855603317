// threshold_encode on the CPU: encode_rows.h, where a register tile is compared with its latents' own thresholds. A row with more
// passing latents than it has slots keeps the strongest, by a running threshold, and still counts them all.
#include "cpu/encode_rows.h"

namespace sae_kernels {

// values come out in the accumulator's type: what is chosen from them later is not chosen on rounded numbers
template <class T> using ThresholdArgs = EncodeArgs<T, Acc<T>, true>;

namespace SK_ISA {

template <class T> void threshold_encode(const ThresholdArgs<T>& args) { encode_rows(args); }

template void threshold_encode<float>(const ThresholdArgs<float>&);
template void threshold_encode<double>(const ThresholdArgs<double>&);
template void threshold_encode<bf16>(const ThresholdArgs<bf16>&);
template void threshold_encode<fp16>(const ThresholdArgs<fp16>&);

}  // namespace SK_ISA
}  // namespace sae_kernels

#ifdef SK_BASELINE
#include <tuple>

#include "common.h"

namespace sae_kernels {

SK_DECLARE(template <class T> void threshold_encode(const ThresholdArgs<T>& args))

// threshold [1] or [d_sae] in the accumulator's dtype
std::tuple<Tensor, Tensor, Tensor> threshold_encode(Tensor x, Tensor W, std::optional<Tensor> b, Tensor threshold, int64_t max_active,
                                                    int64_t activation, std::optional<Tensor> latent_mask) {
  x = dense(x);
  W = dense(W);
  if (b) b = dense(*b);
  threshold = dense(threshold);
  const int64_t rows = x.size(0), d_sae = W.size(0);
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor values = empty_as(x, {rows, max_active}, wide), indices = empty_as(x, {rows, max_active}, ScalarType::Int);
  Tensor counts = empty_as(x, {rows}, ScalarType::Int);
  const LatentLists latents(latent_mask, d_sae);
  std::vector<double> thresholds(d_sae);
  with_float_type(x.scalar_type(), [&]<class T>(T) {
    using A = Acc<T>;
    const int64_t step = threshold.size(0) > 1;
    for (int64_t f = 0; f < d_sae; ++f) thresholds[f] = data<A>(threshold)[f * step];
    const ThresholdArgs<T> args{data<T>(x), data<T>(W), b ? data<T>(*b) : nullptr, rows, x.size(1), d_sae, max_active,
                                static_cast<int>(activation), latents.chosen, latents.count, latents.rest.data(),
                                mutable_data<A>(values), mutable_data<int32_t>(indices), thresholds.data(),
                                mutable_data<int32_t>(counts)};
    SK_DISPATCH(threshold_encode<T>, args);
  });
  return {values, indices, counts};
}

}  // namespace sae_kernels

STABLE_TORCH_LIBRARY_IMPL(sae_kernels, CPU, m) { m.impl("threshold_encode", TORCH_BOX(&sae_kernels::threshold_encode)); }
#endif
