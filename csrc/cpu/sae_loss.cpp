// sae_loss on the CPU: the error of what is decoded, formed in the registers that decoded it (decode_rows.h); gradients of
// decoder and encoder from one order of the entries (code_grads.h).
#include "cpu/code_grads.h"
#include "cpu/decode_rows.h"

namespace sae_kernels {

// x, residual [rows, d_out] (residual: decoded - x, of the last prefix); errors [rows, n_prefixes]
template <class T> struct LossArgs {
  CodeArgs<T> code;
  const T* x; T* residual; Acc<T>* errors;
};

// grad_errors [rows, n_prefixes] -> out [rows, n_prefixes, d_out]: what the slots between prefix p - 1 and p add up into
template <class T> struct PrefixGradArgs {
  CodeArgs<T> code;
  const Acc<T>* grad_errors; const T* residual; T* out;
};

namespace SK_ISA {

template <class T> bool loss(const LossArgs<T>& args) {
  const int64_t d = args.code.d_out, n = args.code.n_prefixes;
  std::fill(args.errors, args.errors + args.code.rows * n, Acc<T>(0));
  return decode_rows(args.code, [&]<int B, bool Part>(int64_t row, int64_t p, int64_t c0, const Vec<Acc<T>> (&total)[B], int64_t columns) {
    constexpr int64_t L = kLanes<Acc<T>>;
    Vec<Acc<T>> square{};
#pragma GCC unroll 24
    for (int b = 0; b < B; ++b) {
      const int64_t at = row * d + c0 + b * L;
      Vec<Acc<T>> off = total[b] - (Part ? load_some(args.x + at, columns - b * L) : load(args.x + at));
      square += off * off;
      if (p < n - 1) continue;
      Part ? store_some(args.residual + at, off, columns - b * L) : store(args.residual + at, off);
    }
    args.errors[row * n + p] += horizontal_sum<Acc<T>>(square);
  });
}

// From the last prefix back: its residual is at hand, and that of the one before lacks the slots between them.
template <class T> void prefix_grads(const PrefixGradArgs<T>& args) {
  using A = Acc<T>;
  const CodeArgs<T>& code = args.code;
  const int64_t d = code.d_out, P = code.n_prefixes, k = code.k;
  parallel_for(0, code.rows, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, k * d)), [&](int64_t begin, int64_t end) {
    Buffer<A> off(d), sum(d);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < d; ++c) off[c] = to_acc(args.residual[r * d + c]), sum[c] = A(0);
      for (int64_t p = P - 1; p >= 0; --p) {
        const A factor = 2 * args.grad_errors[r * P + p];
        T* out = args.out + (r * P + p) * d;
        for (int64_t c = 0; c < d; ++c) out[c] = from_acc<T>(sum[c] += factor * off[c]);
        for (int64_t e = r * k + (p > 0 ? code.prefixes[p - 1] : k); e < r * k + code.prefixes[p]; ++e) {
          const A value = to_acc(code.values[e]);
          const T* w = code.W + code.indices[e] * d;
          for (int64_t c = 0; c < d; ++c) off[c] -= value * to_acc(w[c]);
        }
      }
    }
  });
}

template <class T> void loss_backward(const CodeGradArgs<T>& args) { code_grads(args); }

// sums[c] = sum_n scale[n] * rows[n * step][c]; rows in spans of a fixed length, so the bits do not depend on the threads
template <class T> void column_sums(const T* rows, int64_t n, int64_t d, int64_t step, const Acc<T>* scale, T* sums) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<A>, kSpan = 256;
  const int64_t blocks = (d + L - 1) / L;
  parallel_for(0, blocks, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, n * L)), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * L; c < std::min(d, end * L); c += L) {
      Vec<A> total{};
      for (int64_t s = 0; s < n; s += kSpan) {
        Vec<A> part{};
        for (int64_t r = s; r < std::min(n, s + kSpan); ++r)
          part += (scale ? scale[r] : A(1)) * load_some(rows + r * step * d + c, d - c);
        total += part;
      }
      store_some(sums + c, total, d - c);
    }
  });
}

#define SK_INSTANTIATE(T)                                 \
  template bool loss(const LossArgs<T>&);                 \
  template void prefix_grads(const PrefixGradArgs<T>&);   \
  template void loss_backward(const CodeGradArgs<T>&);    \
  template void column_sums(const T*, int64_t, int64_t, int64_t, const Acc<T>*, T*);
SK_INSTANTIATE(float)
SK_INSTANTIATE(double)
SK_INSTANTIATE(bf16)
SK_INSTANTIATE(fp16)

}  // namespace SK_ISA
}  // namespace sae_kernels

#ifdef SK_BASELINE
#include <tuple>
#include <vector>

#include "common.h"

namespace sae_kernels {

SK_DECLARE(template <class T> bool loss(const LossArgs<T>& args))
SK_DECLARE(template <class T> void prefix_grads(const PrefixGradArgs<T>& args))
SK_DECLARE(template <class T> void loss_backward(const CodeGradArgs<T>& args))
SK_DECLARE(template <class T>
           void column_sums(const T* rows, int64_t n, int64_t d, int64_t step, const Acc<T>* scale, T* sums))
// sparse_decode.cpp
void check_indices(bool good);
Tensor narrow_indices(const Tensor& indices, int64_t d_sae);
Tensor checked_indices(const Tensor& indices, int64_t d_sae);

namespace {

// A code, its indices narrow, and its decoder, contiguous for as long as its kernel runs.
struct Code {
  Tensor values, indices, W;
  std::optional<Tensor> bias;
  std::vector<int64_t> prefixes;
  int64_t rows, k, d_sae, d_out;

  Code(const Tensor& v, const Tensor& i, const Tensor& w, const std::optional<Tensor>& b, std::vector<int64_t> prefixes)
      : values(dense(v)), indices(i), W(dense(w)), prefixes(std::move(prefixes)),
        rows(v.size(0)), k(v.size(1)), d_sae(w.size(0)), d_out(w.size(1)) {
    if (b) bias = dense(*b);
  }
  ScalarType dtype() const { return W.scalar_type(); }
  ScalarType wide() const { return dtype() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }
  int64_t budgets() const { return static_cast<int64_t>(prefixes.size()); }

  template <class T> CodeArgs<T> args() const {
    return {data<T>(values), data<int32_t>(indices), data<T>(W), bias ? data<T>(*bias) : nullptr,
            rows, k, d_out, d_sae, prefixes.data(), budgets()};
  }
  // the prefix that each slot belongs to first
  std::vector<int32_t> budget_of() const {
    std::vector<int32_t> found;
    for (int64_t p = 0; p < budgets(); ++p) found.resize(prefixes[p], static_cast<int32_t>(p));
    return found;
  }
};

using Prefixes = std::vector<int64_t>;

}  // namespace

std::tuple<Tensor, Tensor> sae_loss(Tensor x, Tensor values, Tensor indices, Tensor W, std::optional<Tensor> b,
                                    Prefixes prefixes) {
  const Code code(values, narrow_indices(indices, W.size(0)), W, b, std::move(prefixes));
  x = dense(x);
  Tensor errors = empty_as(x, {code.rows, code.budgets()}, code.wide()), residual = empty_like_dtype(x, {code.rows, code.d_out});
  with_float_type(code.dtype(), [&]<class T>(T) {
    const LossArgs<T> args{code.args<T>(), data<T>(x), mutable_data<T>(residual), mutable_data<Acc<T>>(errors)};
    check_indices(SK_DISPATCH(loss<T>, args));
  });
  return {errors, residual};
}

Tensor sae_loss_prefix_grads(Tensor grad_errors, Tensor residual, Tensor values, Tensor indices, Tensor W, Prefixes prefixes) {
  const Code code(values, checked_indices(indices, W.size(0)), W, std::nullopt, std::move(prefixes));
  grad_errors = dense(grad_errors);
  residual = dense(residual);
  Tensor out = empty_like_dtype(residual, {code.rows, code.budgets(), code.d_out});
  with_float_type(code.dtype(), [&]<class T>(T) {
    const PrefixGradArgs<T> args{code.args<T>(), data<Acc<T>>(grad_errors), data<T>(residual), mutable_data<T>(out)};
    SK_DISPATCH(prefix_grads<T>, args);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sae_loss_backward(
    Tensor grad, std::optional<Tensor> scale, Tensor values, Tensor indices, Tensor W, Prefixes prefixes,
    std::optional<Tensor> x, std::optional<Tensor> centre, std::optional<Tensor> more, bool relu) {
  const Code code(values, checked_indices(indices, W.size(0)), W, std::nullopt, std::move(prefixes));
  grad = dense(grad);
  for (auto* t : {&scale, &x, &centre, &more})
    if (*t) *t = dense(**t);
  const int64_t d_in = x ? x->size(1) : 0;
  Tensor grad_values = empty_like_dtype(W, {x ? 0 : code.rows, code.k}), grad_W = empty_like_dtype(W, {code.d_sae, code.d_out});
  Tensor grad_b = empty_like_dtype(W, {code.d_out});
  Tensor grad_W_enc = empty_like_dtype(W, {x ? code.d_sae : 0, d_in}), grad_b_enc = empty_like_dtype(W, {x ? code.d_sae : 0});
  const std::vector<int32_t> budget_of = code.budget_of();
  with_float_type(code.dtype(), [&]<class T>(T) {
    const Acc<T>* factors = scale ? data<Acc<T>>(*scale) : nullptr;
    const auto maybe = [](const std::optional<Tensor>& t) { return t ? data<T>(*t) : nullptr; };
    const CodeGradArgs<T> args{
        .values = data<T>(code.values), .indices = data<int32_t>(code.indices), .rows = code.rows, .k = code.k,
        .d_sae = code.d_sae, .decoder = true, .encoder = x.has_value(), .grad = data<T>(grad), .scale = factors, .W = data<T>(code.W), .d_out = code.d_out,
        .budgets = code.budgets(), .budget_of = code.budgets() > 1 ? budget_of.data() : nullptr,
        .grad_values = x ? nullptr : mutable_data<T>(grad_values), .grad_W = mutable_data<T>(grad_W), .x = maybe(x),
        .centre = maybe(centre), .more = maybe(more), .d_in = d_in, .relu = relu,
        .grad_W_enc = mutable_data<T>(grad_W_enc), .grad_b_enc = mutable_data<T>(grad_b_enc)};
    SK_DISPATCH(loss_backward<T>, args);
    SK_DISPATCH(column_sums<T>, data<T>(grad), code.rows, code.d_out, code.budgets(), factors, mutable_data<T>(grad_b));
  });
  return {grad_values, grad_W, grad_b, grad_W_enc, grad_b_enc};
}

}  // namespace sae_kernels

STABLE_TORCH_LIBRARY_IMPL(sae_kernels, CPU, m) {
  m.impl("sae_loss", TORCH_BOX(&sae_kernels::sae_loss));
  m.impl("sae_loss_prefix_grads", TORCH_BOX(&sae_kernels::sae_loss_prefix_grads));
  m.impl("sae_loss_backward", TORCH_BOX(&sae_kernels::sae_loss_backward));
}
#endif
