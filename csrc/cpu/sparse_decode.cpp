// sparse_decode on the CPU: decode_rows.h and its gradients (code_grads.h).
#include "cpu/code_grads.h"
#include "cpu/decode_rows.h"

namespace sae_kernels {

// grad [rows, d_out]; W [d_sae, d_out]
template <class T> struct DotArgs {
  const T* grad; const int32_t* indices; const T* W;
  int64_t rows, k, d_out;
  T* out;
};

namespace SK_ISA {
namespace {

template <class T> inline Acc<T> dot(const T* a, const T* b, int64_t d) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<A>;
  Vec<A> sum[4] = {};
  int64_t c = 0;
  for (; c + 4 * L <= d; c += 4 * L)
    for (int i = 0; i < 4; ++i) sum[i] += load(a + c + i * L) * load(b + c + i * L);
  for (; c < d; c += L) sum[0] += load_some(a + c, d - c) * load_some(b + c, d - c);
  return horizontal_sum<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

}  // namespace

template <class I> bool indices_in_range(const I* indices, int64_t n, int64_t d_sae) {
  std::atomic<bool> good{true};
  parallel_for(0, n, 65536, [&](int64_t begin, int64_t end) {
    if (!in_range(indices + begin, end - begin, d_sae)) good = false;
  });
  return good;
}
template bool indices_in_range(const int32_t*, int64_t, int64_t);
template bool indices_in_range(const int64_t*, int64_t, int64_t);

template <class T> bool decode(const CodeArgs<T>& args, T* out) {
  return decode_rows(args, [&]<int B, bool Part>(int64_t row, int64_t, int64_t c0, const Vec<Acc<T>> (&total)[B], int64_t columns) {
    constexpr int64_t L = kLanes<Acc<T>>;
#pragma GCC unroll 24
    for (int b = 0; b < B; ++b) {
      T* to = out + row * args.d_out + c0 + b * L;
      if (Part) store_some(to, total[b], columns - b * L);
      else store(to, total[b]);
    }
  });
}

template <class T> void decode_grad_values(const DotArgs<T>& args) {
  const int64_t d = args.d_out, k = args.k;
  parallel_for(0, args.rows, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, k * d)), [&](int64_t begin, int64_t end) {
    for (int64_t e = begin * k; e < end * k; ++e)
      args.out[e] = from_acc<T>(dot(args.grad + e / k * d, args.W + args.indices[e] * d, d));
  });
}

template <class T> void decode_backward(const CodeGradArgs<T>& args) { code_grads(args); }

#define SK_INSTANTIATE(T)                                  \
  template bool decode(const CodeArgs<T>&, T*);            \
  template void decode_grad_values(const DotArgs<T>&);     \
  template void decode_backward(const CodeGradArgs<T>&);
SK_INSTANTIATE(float)
SK_INSTANTIATE(double)
SK_INSTANTIATE(bf16)
SK_INSTANTIATE(fp16)

}  // namespace SK_ISA
}  // namespace sae_kernels

#ifdef SK_BASELINE
#include <tuple>

#include "common.h"

namespace sae_kernels {

SK_DECLARE(template <class T> bool decode(const CodeArgs<T>& args, T* out))
SK_DECLARE(template <class T> void decode_grad_values(const DotArgs<T>& args))
SK_DECLARE(template <class T> void decode_backward(const CodeGradArgs<T>& args))
SK_DECLARE(template <class I> bool indices_in_range(const I* indices, int64_t n, int64_t d_sae))

void check_indices(bool good) { STD_TORCH_CHECK(good, "sparse_decode: indices must be in [0, d_sae)"); }

// int32, contiguous; those that were wider have been checked to be rows of W
Tensor narrow_indices(const Tensor& indices, int64_t d_sae) {
  const Tensor whole = dense(indices);
  if (whole.scalar_type() == ScalarType::Int) return whole;
  check_indices(SK_DISPATCH(indices_in_range<int64_t>, data<int64_t>(whole), whole.numel(), d_sae));
  return torch::stable::to(whole, ScalarType::Int);
}

// the same, all of them checked
Tensor checked_indices(const Tensor& indices, int64_t d_sae) {
  const Tensor narrow = narrow_indices(indices, d_sae);
  if (indices.scalar_type() == ScalarType::Int)
    check_indices(SK_DISPATCH(indices_in_range<int32_t>, data<int32_t>(narrow), narrow.numel(), d_sae));
  return narrow;
}

Tensor sparse_decode(Tensor values, Tensor indices, Tensor W, std::optional<Tensor> b) {
  const int64_t rows = values.size(0), k = values.size(1), d_sae = W.size(0), d_out = W.size(1);
  indices = narrow_indices(indices, d_sae);
  values = dense(values);
  W = dense(W);
  if (b) b = dense(*b);
  Tensor out = empty_like_dtype(W, {rows, d_out});
  with_float_type(W.scalar_type(), [&]<class T>(T) {
    const CodeArgs<T> args{data<T>(values), data<int32_t>(indices), data<T>(W), b ? data<T>(*b) : nullptr,
                           rows, k, d_out, d_sae, &k, 1};
    check_indices(SK_DISPATCH(decode<T>, args, mutable_data<T>(out)));
  });
  return out;
}

std::tuple<Tensor, Tensor> sparse_decode_backward(Tensor grad, Tensor values, Tensor indices, Tensor W) {
  const int64_t rows = values.size(0), k = values.size(1), d_sae = W.size(0), d_out = W.size(1);
  grad = dense(grad);
  values = dense(values);
  indices = checked_indices(indices, d_sae);
  W = dense(W);
  Tensor grad_values = empty_like_dtype(values, {rows, k}), grad_W = empty_like_dtype(W, {d_sae, d_out});
  with_float_type(W.scalar_type(), [&]<class T>(T) {
    const CodeGradArgs<T> args{.values = data<T>(values), .indices = data<int32_t>(indices), .rows = rows, .k = k,
                               .d_sae = d_sae, .decoder = true, .grad = data<T>(grad), .W = data<T>(W), .d_out = d_out,
                               .grad_values = mutable_data<T>(grad_values), .grad_W = mutable_data<T>(grad_W)};
    SK_DISPATCH(decode_backward<T>, args);
  });
  return {grad_values, grad_W};
}

Tensor sparse_decode_grad_values(Tensor grad, Tensor indices, Tensor W) {
  const int64_t rows = indices.size(0), k = indices.size(1), d_sae = W.size(0), d_out = W.size(1);
  grad = dense(grad);
  indices = checked_indices(indices, d_sae);
  W = dense(W);
  Tensor grad_values = empty_like_dtype(grad, {rows, k});
  with_float_type(W.scalar_type(), [&]<class T>(T) {
    const DotArgs<T> args{data<T>(grad), data<int32_t>(indices), data<T>(W), rows, k, d_out, mutable_data<T>(grad_values)};
    SK_DISPATCH(decode_grad_values<T>, args);
  });
  return grad_values;
}

}  // namespace sae_kernels

STABLE_TORCH_LIBRARY_IMPL(sae_kernels, CPU, m) {
  m.impl("sparse_decode", TORCH_BOX(&sae_kernels::sparse_decode));
  m.impl("sparse_decode_backward", TORCH_BOX(&sae_kernels::sparse_decode_backward));
  m.impl("sparse_decode_grad_values", TORCH_BOX(&sae_kernels::sparse_decode_grad_values));
}
#endif
