// refit_values on the CPU: conjugate gradients on a row's own decoder rows, which are copied to the cache once.
#include "cpu/latent_sums.h"

namespace sae_kernels {

// x [rows, d]; values, indices [rows, k]; W [d_sae, d]; out [rows, k]
template <class T> struct RefitArgs {
  const T* x; const T* values; const int32_t* indices; const T* W;
  int64_t rows, k, d, steps;
  T* out;
};

namespace SK_ISA {
namespace {

// The chosen rows of W [m, width], densely, each filled up with zeros to whole vectors.
template <class A> struct Chosen {
  const A* W; int64_t m, width;
};

// sum_j weights[j] * W[j], handed on as (column, vector)
template <int B, class A, class F>
inline void combine_block(const Chosen<A>& chosen, const A* weights, int64_t c0, const F& take) {
  constexpr int64_t L = kLanes<A>;
  Vec<A> total[B] = {};
  for (int64_t j = 0; j < chosen.m; ++j) {
    const Vec<A> weight = splat(weights[j]);
    const A* w = chosen.W + j * chosen.width + c0;
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) total[b] += weight * load(w + b * L);
  }
  for (int b = 0; b < B; ++b) take(c0 + b * L, total[b]);
}

template <class A, class F> inline void combine(const Chosen<A>& chosen, const A* weights, const F& take) {
  constexpr int64_t L = kLanes<A>;
  int64_t c = 0;
  for (; c + 8 * L <= chosen.width; c += 8 * L) combine_block<8>(chosen, weights, c, take);
  for (; c < chosen.width; c += L) combine_block<1>(chosen, weights, c, take);
}

// dots[j] = W[j] . y; returns their sum of squares
template <class A> inline A dots_with(const Chosen<A>& chosen, const A* y, A* dots) {
  constexpr int64_t L = kLanes<A>;
  A squares = 0;
  for (int64_t j = 0; j < chosen.m; j += 4) {
    const int64_t n = std::min<int64_t>(4, chosen.m - j);
    const A* w[4];
    for (int i = 0; i < 4; ++i) w[i] = chosen.W + (j + std::min<int64_t>(i, n - 1)) * chosen.width;
    Vec<A> sum[4] = {};
    for (int64_t c = 0; c < chosen.width; c += L) {
      const Vec<A> here = load(y + c);
      for (int i = 0; i < 4; ++i) sum[i] += here * load(w[i] + c);
    }
    for (int i = 0; i < n; ++i) {
      dots[j + i] = horizontal_sum<A>(sum[i]);
      squares += dots[j + i] * dots[j + i];
    }
  }
  return squares;
}

template <class A> struct Scratch {
  Buffer<A> W, error, moved, fit, gradient, direction;
  Scratch(int64_t k, int64_t width) : W(k * width), error(width), moved(width), fit(k), gradient(k), direction(k) {}
};

// From fit on, until a step would take less than rounding from the squared error. What is NaN goes on, and stays so.
template <class A> void descend(const Chosen<A>& chosen, int64_t steps, const Scratch<A>& s) {
  A size = 0;
  for (int64_t step = 0; step < steps; ++step) {
    const A last = size;
    size = dots_with(chosen, s.error.p, s.gradient.p);
    const A turn = step && last != 0 ? size / last : A(0);
    for (int64_t j = 0; j < chosen.m; ++j)
      s.direction.p[j] = s.gradient.p[j] + (step ? turn * s.direction.p[j] : A(0));
    Vec<A> errors{}, moves{};
    combine(chosen, s.direction.p, [&](int64_t c, Vec<A> moved) {
      const Vec<A> error = load(s.error.p + c);
      store(s.moved.p + c, moved);
      moves += moved * moved;
      errors += error * error;
    });
    const A move = horizontal_sum<A>(moves), length = move != 0 ? size / move : A(0);
    if (length * size <= std::numeric_limits<A>::epsilon() * horizontal_sum<A>(errors)) return;
    for (int64_t j = 0; j < chosen.m; ++j) s.fit.p[j] += length * s.direction.p[j];
    for (int64_t c = 0; c < chosen.width; c += kLanes<A>)
      store(s.error.p + c, load(s.error.p + c) - splat(length) * load(s.moved.p + c));
  }
}

}  // namespace

template <class T> void refit(const RefitArgs<T>& args) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t k = args.k, d = args.d, width = (d + L - 1) / L * L;
  parallel_for(0, args.rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, k * d)), [&](int64_t begin, int64_t end) {
    const Scratch<A> s(k, width);
    for (int64_t row = begin; row < end; ++row) {
      const T* values = args.values + row * k;
      const int32_t* indices = args.indices + row * k;
      int64_t m = 0;
      for (int64_t j = 0; j < k; ++j) {
        const A value = to_acc(values[j]);
        if (value == 0) continue;
        const T* w = args.W + indices[j] * d;
        for (int64_t c = 0; c < width; c += L) store(s.W.p + m * width + c, load_some(w + c, d - c));
        s.fit.p[m++] = value;
      }
      const Chosen<A> chosen{s.W.p, m, width};
      const T* x = args.x + row * d;
      combine(chosen, s.fit.p, [&](int64_t c, Vec<A> made) { store(s.error.p + c, load_some(x + c, d - c) - made); });
      descend(chosen, args.steps, s);
      m = 0;
      for (int64_t j = 0; j < k; ++j)
        args.out[row * k + j] = to_acc(values[j]) == 0 ? values[j] : from_acc<T>(s.fit.p[m++]);
    }
  });
}

#define SK_INSTANTIATE(T) template void refit(const RefitArgs<T>&);
SK_INSTANTIATE(float)
SK_INSTANTIATE(double)
SK_INSTANTIATE(bf16)
SK_INSTANTIATE(fp16)

}  // namespace SK_ISA
}  // namespace sae_kernels

#ifdef SK_BASELINE
#include "common.h"

namespace sae_kernels {

SK_DECLARE(template <class T> void refit(const RefitArgs<T>& args))

Tensor checked_indices(const Tensor& indices, int64_t d_sae);  // sparse_decode.cpp

Tensor refit_values(Tensor x, Tensor values, Tensor indices, Tensor W, int64_t steps) {
  const int64_t rows = values.size(0), k = values.size(1), d = W.size(1);
  x = dense(x);
  values = dense(values);
  indices = checked_indices(indices, W.size(0));
  W = dense(W);
  Tensor out = empty_like_dtype(values, {rows, k});
  with_float_type(W.scalar_type(), [&]<class T>(T) {
    const RefitArgs<T> args{data<T>(x), data<T>(values), data<int32_t>(indices), data<T>(W), rows, k, d, steps,
                            mutable_data<T>(out)};
    SK_DISPATCH(refit<T>, args);
  });
  return out;
}

}  // namespace sae_kernels

STABLE_TORCH_LIBRARY_IMPL(sae_kernels, CPU, m) { m.impl("refit_values", TORCH_BOX(&sae_kernels::refit_values)); }
#endif
