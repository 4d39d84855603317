// Gradients through a code: of its values and of the decoder, from the gradient of what was decoded, and of the encoder that
// made the values. One order of the entries serves all of them.
#pragma once

#include "cpu/latent_sums.h"

namespace sae_kernels {

// values, indices [rows, k].
// Where `decoder`: grad [rows * budgets, d_out], of which slot j takes row n * budgets + budget_of[j]
// (budget_of null: row n), times scale[n] unless null; W, grad_W [d_sae, d_out]; grad_values [rows, k] or null.
// Where `encoder`: values = W_enc (x - centre) + b_enc, and those that are 0 pass no gradient where `relu`.
// x [rows, d_in]; centre [d_in] or null; more [rows, k] or null is added to the decoder's gradient of the values;
// grad_W_enc [d_sae, d_in]; grad_b_enc [d_sae].
template <class T> struct CodeGradArgs {
  const T* values; const int32_t* indices;
  int64_t rows, k, d_sae;
  bool decoder = false, encoder = false;
  const T* grad; const Acc<T>* scale; const T* W;
  int64_t d_out, budgets = 1; const int32_t* budget_of;
  T* grad_values; T* grad_W;
  const T* x; const T* centre; const T* more;
  int64_t d_in; bool relu;
  T* grad_W_enc; T* grad_b_enc;
};

namespace SK_ISA {

template <class T> void code_grads(const CodeGradArgs<T>& args) {
  using A = Acc<T>;
  const int64_t k = args.k, d_sae = args.d_sae;
  const bool narrow = !std::is_same_v<T, A> && block_rows(args.rows, k, d_sae) < args.rows;
  Buffer<A> wide(narrow && args.decoder ? d_sae * args.d_out : 0), wide_enc(narrow && args.encoder ? d_sae * args.d_in : 0);
  Buffer<A> totals(args.encoder ? d_sae : 0);
  const LatentSums<T> decoder{args.W, nullptr, args.d_out, args.grad_W, narrow ? wide.p : nullptr, nullptr};
  const LatentSums<T> encoder{nullptr, args.centre, args.d_in, args.grad_W_enc, narrow ? wide_enc.p : nullptr, totals.p};

  each_block(args.indices, args.rows, k, d_sae, [&](const LatentOrder& order, int64_t r0, int64_t n, bool first, bool last) {
    Buffer<A> weights(order.n), dots(order.n);
    Buffer<uint32_t> budget_row(args.budget_of ? order.n : 0);
    const auto scale = [&](int64_t i) { return args.scale ? args.scale[r0 + order.row[i]] : A(1); };
    if (args.decoder) {
      order.each([&](int64_t i, int64_t e) {
        weights[i] = scale(i) * to_acc(args.values[r0 * k + e]);
        dots[i] = A(0);
        if (args.budget_of) budget_row[i] = static_cast<uint32_t>(order.row[i] * args.budgets + args.budget_of[order.slot[i]]);
      });
      const Block block{order, args.budget_of ? budget_row.p : order.row.p, first, last};
      sum_block<true>(decoder, block, weights.p, args.grad + r0 * args.budgets * args.d_out, n * args.budgets, dots.p);
    }
    if (args.grad_values) order.each([&](int64_t i, int64_t e) { args.grad_values[r0 * k + e] = from_acc<T>(scale(i) * dots[i]); });
    if (args.encoder) {
      order.each([&](int64_t i, int64_t e) {
        const A grad = (args.decoder ? scale(i) * dots[i] : A(0)) + (args.more ? to_acc(args.more[r0 * k + e]) : A(0));
        weights[i] = args.relu && to_acc(args.values[r0 * k + e]) == A(0) ? A(0) : grad;
      });
      const Block block{order, order.row.p, first, last};
      sum_block<false, T>(encoder, block, weights.p, args.x + r0 * args.d_in, n, nullptr);
    }
  });
  if (args.encoder)
    for (int64_t f = 0; f < d_sae; ++f) args.grad_b_enc[f] = from_acc<T>(totals[f]);
}

}  // namespace SK_ISA
}  // namespace sae_kernels
