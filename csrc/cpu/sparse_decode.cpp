// sparse_decode on the CPU: gathers and sums the chosen rows of W_dec; backward per latent (latent_sums.h).
// Forward reads k rows of d_out per row of output, kBlock vectors wide at a time, summed in registers.
#include "cpu/latent_sums.h"

namespace sae_kernels {

// values, indices [rows, k]; W [d_sae, d_out]; grad, out [rows, d_out]; all contiguous, indices in range.
template <class T> struct DecodeArgs {
  const T* values; const int32_t* indices; const T* W; const T* bias; const T* grad;
  int64_t rows, k, d_out, d_sae;
  T* out; T* grad_values; T* grad_W;
};

namespace SK_ISA {
namespace {

constexpr int kAhead = 8;

// out[c0 .. c0 + Block * L) of one row
template <int Block, class T>
inline void decode_columns(const DecodeArgs<T>& args, int64_t row, int64_t c0) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const T* values = args.values + row * args.k;
  const int32_t* indices = args.indices + row * args.k;
  // where one pass does the whole row, what comes ahead is in the next rows too
  const int64_t ahead_end = Block * L >= args.d_out ? (args.rows - row) * args.k : args.k;
  Vec<A> acc[Block];
#pragma GCC unroll 16
  for (int b = 0; b < Block; ++b) acc[b] = args.bias ? load(args.bias + c0 + b * L) : Vec<A>{};
  for (int64_t j = 0; j < args.k; ++j) {
    const A value = to_acc(values[j]);
    const T* w = args.W + indices[j] * args.d_out + c0;
    if (j + kAhead < ahead_end) prefetch_row(args.W + indices[j + kAhead] * args.d_out + c0, Block * L);
#pragma GCC unroll 16
    for (int b = 0; b < Block; ++b) acc[b] += value * load(w + b * L);
  }
#pragma GCC unroll 16
  for (int b = 0; b < Block; ++b) store(args.out + row * args.d_out + c0 + b * L, acc[b]);
}

template <class T> inline void decode_row(const DecodeArgs<T>& args, int64_t row) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<A>, Block = kVecBytes == 64 ? 16 : 8;
  int64_t c = 0;
  for (; c + Block * L <= args.d_out; c += Block * L) decode_columns<Block>(args, row, c);
  for (; c + 4 * L <= args.d_out; c += 4 * L) decode_columns<4>(args, row, c);
  for (; c + L <= args.d_out; c += L) decode_columns<1>(args, row, c);
  for (; c < args.d_out; ++c) {
    A sum = args.bias ? to_acc(args.bias[c]) : A(0);
    for (int64_t j = 0; j < args.k; ++j)
      sum += to_acc(args.values[row * args.k + j]) * to_acc(args.W[args.indices[row * args.k + j] * args.d_out + c]);
    args.out[row * args.d_out + c] = from_acc<T>(sum);
  }
}

template <class T> inline Acc<T> dot(const T* a, const T* b, int64_t d) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<A>;
  Vec<A> sum[4] = {};
  int64_t c = 0;
  for (; c + 4 * L <= d; c += 4 * L)
    for (int i = 0; i < 4; ++i) sum[i] += load(a + c + i * L) * load(b + c + i * L);
  for (; c + L <= d; c += L) sum[0] += load(a + c) * load(b + c);
  A total = horizontal_sum<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; c < d; ++c) total += to_acc(a[c]) * to_acc(b[c]);
  return total;
}

template <class F> void over_rows(int64_t rows, int64_t k, int64_t d, const F& f) {
  parallel_for(0, rows, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, k * d)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) f(r);
  });
}

}  // namespace

// negative ones are the largest of all once unsigned
bool indices_in_range(const int64_t* indices, int64_t n, int64_t d_sae) {
  uint64_t worst = 0;
  for (int64_t i = 0; i < n; ++i) worst = std::max(worst, static_cast<uint64_t>(indices[i]));
  return n == 0 || worst < static_cast<uint64_t>(d_sae);
}
bool indices_in_range(const int32_t* indices, int64_t n, int64_t d_sae) {
  uint32_t worst = 0;
  for (int64_t i = 0; i < n; ++i) worst = std::max(worst, static_cast<uint32_t>(indices[i]));
  return n == 0 || worst < static_cast<uint64_t>(d_sae);
}

template <class T> void decode(const DecodeArgs<T>& args) {
  over_rows(args.rows, args.k, args.d_out, [&](int64_t r) { decode_row(args, r); });
}

template <class T> void decode_grad_values(const DecodeArgs<T>& args) {
  over_rows(args.rows, args.k, args.d_out, [&](int64_t r) {
    for (int64_t e = r * args.k; e < (r + 1) * args.k; ++e)
      args.grad_values[e] = from_acc<T>(dot(args.grad + r * args.d_out, args.W + args.indices[e] * args.d_out, args.d_out));
  });
}

template <class T> void decode_backward(const DecodeArgs<T>& args) {
  latent_sums<true, T>(args.values, args.indices, args.grad, args.W, args.rows, args.k, args.d_out, args.d_sae, args.grad_W,
                       nullptr, args.grad_values);
}

#define SK_INSTANTIATE(T)                                  \
  template void decode(const DecodeArgs<T>&);              \
  template void decode_grad_values(const DecodeArgs<T>&);  \
  template void decode_backward(const DecodeArgs<T>&);
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

SK_DECLARE(template <class T> void decode(const DecodeArgs<T>& args))
SK_DECLARE(template <class T> void decode_grad_values(const DecodeArgs<T>& args))
SK_DECLARE(template <class T> void decode_backward(const DecodeArgs<T>& args))
SK_DECLARE(bool indices_in_range(const int64_t* indices, int64_t n, int64_t d_sae))
SK_DECLARE(bool indices_in_range(const int32_t* indices, int64_t n, int64_t d_sae))

// int32, contiguous, every one a row of W
Tensor checked_indices(const Tensor& indices, int64_t d_sae) {
  const Tensor whole = dense(indices);
  const int64_t n = whole.numel();
  const bool wide = whole.scalar_type() == ScalarType::Long;
  const bool good = wide ? SK_DISPATCH(indices_in_range, data<int64_t>(whole), n, d_sae)
                         : SK_DISPATCH(indices_in_range, data<int32_t>(whole), n, d_sae);
  STD_TORCH_CHECK(good, "sparse_decode: indices must be in [0, d_sae)");
  return wide ? torch::stable::to(whole, ScalarType::Int) : whole;
}

Tensor sparse_decode(Tensor values, Tensor indices, Tensor W, std::optional<Tensor> b) {
  const int64_t rows = values.size(0), k = values.size(1), d_sae = W.size(0), d_out = W.size(1);
  indices = checked_indices(indices, d_sae);
  values = dense(values);
  W = dense(W);
  if (b) b = dense(*b);
  Tensor out = empty_like_dtype(W, {rows, d_out});
  with_float_type(W.scalar_type(), [&]<class T>(T) {
    const DecodeArgs<T> args{.values = data<T>(values), .indices = data<int32_t>(indices), .W = data<T>(W),
                             .bias = b ? data<T>(*b) : nullptr, .rows = rows, .k = k, .d_out = d_out, .d_sae = d_sae,
                             .out = mutable_data<T>(out)};
    SK_DISPATCH(decode<T>, args);
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
    const DecodeArgs<T> args{.values = data<T>(values), .indices = data<int32_t>(indices), .W = data<T>(W), .grad = data<T>(grad),
                             .rows = rows, .k = k, .d_out = d_out, .d_sae = d_sae,
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
    const DecodeArgs<T> args{.indices = data<int32_t>(indices), .W = data<T>(W), .grad = data<T>(grad), .rows = rows, .k = k,
                             .d_out = d_out, .d_sae = d_sae, .grad_values = mutable_data<T>(grad_values)};
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
