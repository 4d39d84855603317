"""sparse_decode in Triton: rows of W_dec gathered and summed in float32, never a code of size rows x d_sae."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .product import product


@triton.jit
def add_slots(
    total, values, indices, W, row, column, live, inside, first, last, k, d_sae, d_out,
    ACC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """total [rows, columns] + sum of values[:, j] W[indices[:, j]], first <= j < last, j in order."""
    for start in range(first, last, UNROLL):
        for step in tl.static_range(UNROLL):
            at = start + step + tl.zeros_like(row)
            on = live & (at < last)
            latent = tl.load(indices + row * k + at, mask=on, other=0).to(tl.int64)
            value = tl.load(values + row * k + at, mask=on, other=0.0).to(ACC)
            valid = (latent >= 0) & (latent < d_sae)
            here = (on & valid)[:, None] & inside[None, :]
            weight = tl.load(W + latent[:, None] * d_out + column[None, :], mask=here, other=0.0).to(ACC)
            total += tl.where(valid, value, float("nan"))[:, None] * weight
    return total


@triton.jit(do_not_specialize=["rows"])
def decode(
    values, indices, W, bias, out, rows, k, d_sae, d_out,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """out [rows, d_out] = sum_j values[:, j] W[indices[:, j]] + bias, j in order; an index out of range makes its row
    NaN.

    Row tiles run fastest, so at any time the programs read one slice of BLOCK_D columns of W, which stays in L2.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live, inside = row < rows, column < d_out
    total = tl.zeros((ROWS, BLOCK_D), ACC)
    total = add_slots(total, values, indices, W, row, column, live, inside, 0, k, k, d_sae, d_out, ACC, UNROLL)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(ACC)[None, :]
    tl.store(
        out + row[:, None] * d_out + column[None, :],
        total.to(out.dtype.element_ty),
        mask=live[:, None] & inside[None, :],
    )


@triton.jit(do_not_specialize=["rows"])
def put_codes(values, indices, codes, rows, k, d_sae, ROWS: tl.constexpr):
    """codes [rows, d_sae] += the code, entry after entry of a row; an index out of range leaves NaN."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    for j in range(k):
        latent = tl.load(indices + row * k + j, mask=live, other=0).to(tl.int64)
        value = tl.load(values + row * k + j, mask=live, other=0.0).to(tl.float32)
        valid = (latent >= 0) & (latent < d_sae)
        at = codes + row * d_sae + tl.where(valid, latent, 0)
        total = tl.load(at, mask=live, other=0.0).to(tl.float32) + tl.where(valid, value, float("nan"))
        tl.store(at, total.to(codes.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["rows"])
def dot_rows(
    grad, indices, W, parts, rows, k, d_sae, d_out, ACC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """parts [slices, rows, k] = <grad[row], W[indices[row, j]]> over one slice of columns; NaN if out of range.

    Rows run fastest, so at any time the programs read one slice of W, which stays in L2.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d_out
    g = tl.load(grad + row * d_out + column, mask=inside, other=0.0).to(ACC)
    to = parts + (tl.program_id(1).to(tl.int64) * rows + row) * k
    for start in range(0, k, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        latent = tl.load(indices + row * k + slot, mask=slot < k, other=0).to(tl.int64)
        valid = (latent >= 0) & (latent < d_sae)
        here = (valid & (slot < k))[:, None] & inside[None, :]
        w = tl.load(W + latent[:, None] * d_out + column[None, :], mask=here, other=0.0).to(ACC)
        dot = tl.sum(w * g[None, :], 1)
        tl.store(to + slot, tl.where(valid, dot, float("nan")), mask=slot < k)


def accumulator(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def sparse_decode(values: Tensor, indices: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """values, indices [N, k], W [d_sae, d_out], b [d_out] -> [N, d_out] in W's dtype."""
    out = W.new_empty(values.shape[0], W.shape[1])
    if out.numel() > 0 and goes_dense(*W.shape, values.shape[1], W.dtype):
        decode_dense(values.contiguous(), indices.contiguous(), W, b, out)
    elif out.numel() > 0:
        plan = tuning.decode_plan(W.shape[1], W.element_size())
        decode[(triton.cdiv(out.shape[0], plan.ROWS), triton.cdiv(out.shape[1], plan.BLOCK_D))](
            values.contiguous(), indices.contiguous(), W.contiguous(), None if b is None else b.contiguous(), out,
            *values.shape, *W.shape, HAS_BIAS=b is not None, ACC=accumulator(W.dtype),
            ROWS=plan.ROWS, BLOCK_D=plan.BLOCK_D, UNROLL=plan.UNROLL, num_warps=plan.warps,
        )  # fmt: skip
    return out


def goes_dense(d_sae: int, d_out: int, k: int, dtype: torch.dtype) -> bool:
    """Whether a product over all latents is quicker than gathering k rows of W: where there are few latents per entry,
    and tensor cores multiply them as exactly as the gathers would.
    """
    return dtype.itemsize == 2 and d_sae <= k * tuning.decode_plan(d_out, dtype.itemsize).dense_below


def decode_dense(values: Tensor, indices: Tensor, W: Tensor, b: Tensor | None, out: Tensor) -> None:
    """Codes of as many rows as the slab's workspace holds, times W. What is not finite anywhere in W reaches every row.

    Entries of one latent in one row are added in W's dtype.
    """
    d_sae, d_out = W.shape
    each = d_sae * W.element_size() + 4 * d_out
    rows = max(1, min(len(out), tuning.whole(tuning.slab_plan(W.element_size()).nbytes // each)))
    codes, wide = W.new_empty(rows, d_sae), W.new_empty(rows, d_out, dtype=torch.float32)
    for top in range(0, len(out), rows):
        here = slice(top, min(top + rows, len(out)))
        n = here.stop - top
        codes[:n].zero_()
        put_codes[(triton.cdiv(n, 32),)](
            values[here], indices[here], codes, n, values.shape[1], d_sae, ROWS=32, num_warps=1
        )
        product(codes[:n], W.mT, wide[:n])
        out[here] = wide[:n] if b is None else wide[:n] + b


def grad_values(grad: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """grad [N, d_out], indices [N, k], W [d_sae, d_out] -> [N, k] in the dtype in which they are added."""
    (rows, k), wide = indices.shape, torch.float64 if W.dtype == torch.float64 else torch.float32
    if rows * k * W.shape[1] == 0:
        return grad.new_zeros(rows, k, dtype=wide)
    plan = tuning.dot_plan(k, W.shape[1], W.element_size())
    slices = triton.cdiv(W.shape[1], plan.BLOCK_D)
    parts = grad.new_empty(slices, rows, k, dtype=wide)
    dot_rows[(rows, slices)](
        grad.contiguous(), indices.contiguous(), W.contiguous(), parts, rows, k, *W.shape,
        ACC=accumulator(W.dtype), BLOCK_K=plan.BLOCK_K, BLOCK_D=plan.BLOCK_D, num_warps=plan.warps,
        maxnreg=tuning.MOST_REGISTERS,
    )  # fmt: skip
    return parts[0] if slices == 1 else parts.sum(0)
