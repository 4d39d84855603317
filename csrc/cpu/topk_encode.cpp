// topk_encode on the CPU: encode_rows.h with no threshold but the running one, and the weight gradients.
#include "cpu/code_grads.h"
#include "cpu/encode_rows.h"

namespace sae_kernels {

namespace SK_ISA {

template <class T> void encode(const EncodeArgs<T>& args) { encode_rows(args); }

template <class T> void encode_backward(const CodeGradArgs<T>& args) { code_grads(args); }

#define SK_INSTANTIATE(T)                     \
  template void encode(const EncodeArgs<T>&); \
  template void encode_backward(const CodeGradArgs<T>&);
SK_INSTANTIATE(float)
SK_INSTANTIATE(double)
SK_INSTANTIATE(bf16)
SK_INSTANTIATE(fp16)

}  // namespace SK_ISA
}  // namespace sae_kernels

#ifdef SK_BASELINE
#include <cstdlib>
#include <new>
#include <tuple>

#include "common.h"

namespace sae_kernels {

SK_DECLARE(template <class T> void encode(const EncodeArgs<T>& args))
SK_DECLARE(template <class T> void encode_backward(const CodeGradArgs<T>& args))

void* workspace(int64_t bytes) {
  void* p = std::aligned_alloc(64, static_cast<size_t>((std::max<int64_t>(bytes, 1) + 63) / 64 * 64));
  if (!p) throw std::bad_alloc();
  return p;
}
void release(void* p) { std::free(p); }

std::tuple<Tensor, Tensor> topk_encode(Tensor x, Tensor W, std::optional<Tensor> b, int64_t k, int64_t activation,
                                       std::optional<Tensor> latent_mask) {
  x = dense(x);
  W = dense(W);
  if (b) b = dense(*b);
  const int64_t rows = x.size(0), d_sae = W.size(0);
  Tensor values = empty_like_dtype(x, {rows, k}), indices = empty_as(x, {rows, k}, ScalarType::Int);
  const LatentLists latents(latent_mask, d_sae);
  with_float_type(x.scalar_type(), [&]<class T>(T) {
    const EncodeArgs<T> args{
        data<T>(x), data<T>(W), b ? data<T>(*b) : nullptr, rows, x.size(1), d_sae, k, static_cast<int>(activation),
        latents.chosen, latents.count, latents.rest.data(), mutable_data<T>(values), mutable_data<int32_t>(indices)};
    SK_DISPATCH(encode<T>, args);
  });
  return {values, indices};
}

std::tuple<Tensor, Tensor> topk_encode_backward(Tensor grad_pre, Tensor indices, Tensor x, int64_t d_sae) {
  grad_pre = dense(grad_pre);
  indices = dense(indices);
  x = dense(x);
  Tensor grad_W = empty_like_dtype(x, {d_sae, x.size(1)}), grad_b = empty_like_dtype(x, {d_sae});
  with_float_type(x.scalar_type(), [&]<class T>(T) {
    const CodeGradArgs<T> args{.indices = data<int32_t>(indices), .rows = x.size(0), .k = grad_pre.size(1),
                               .d_sae = d_sae, .encoder = true,
                               .x = data<T>(x), .more = data<T>(grad_pre), .d_in = x.size(1),
                               .grad_W_enc = mutable_data<T>(grad_W), .grad_b_enc = mutable_data<T>(grad_b)};
    SK_DISPATCH(encode_backward<T>, args);
  });
  return {grad_W, grad_b};
}

}  // namespace sae_kernels

STABLE_TORCH_LIBRARY_IMPL(sae_kernels, CPU, m) {
  m.impl("topk_encode", TORCH_BOX(&sae_kernels::topk_encode));
  m.impl("topk_encode_backward", TORCH_BOX(&sae_kernels::topk_encode_backward));
}
#endif
