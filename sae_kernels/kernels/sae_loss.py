"""sae_loss in Triton: errors formed by the programs that decode, all weight gradients from one order of the entries."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .latent_sums import Chunks, latent_sums, positions_at, put_sums, put_total
from .sparse_decode import accumulator, add_slots, grad_values

_SHARE = 512  # rows that one program adds up: their sums are few beside them


@triton.jit(do_not_specialize=["rows"])
def decode_errors(
    x, values, indices, W, bias, prefixes, residual, errors, rows, k, d_sae, d_out, n_prefixes,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """residual [rows, d_out] = decoded - x; errors [slices, rows, n_prefixes]: the squares of this slice."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live, inside = row < rows, column < d_out
    here, place = live[:, None] & inside[None, :], row[:, None] * d_out + column[None, :]
    off = -tl.load(x + place, mask=here, other=0.0).to(ACC)
    if HAS_BIAS:
        off += tl.load(bias + column, mask=inside, other=0.0).to(ACC)[None, :]
    first = 0
    for p in range(n_prefixes):
        last = tl.load(prefixes + p)
        off = add_slots(off, values, indices, W, row, column, live, inside, first, last, k, d_sae, d_out, ACC, UNROLL)
        square = tl.sum(tl.where(here, off * off, 0.0), 1)
        tl.store(errors + (tl.program_id(1).to(tl.int64) * rows + row) * n_prefixes + p, square, mask=live)
        first = last
    tl.store(residual + place, off.to(residual.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def prefix_gradients(
    grad_errors, residual, values, indices, W, prefixes, out, rows, k, d_sae, d_out, n_prefixes,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """out [rows, n_prefixes, d_out]: the gradient of what the slots between prefix p - 1 and p add, last first."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live, inside = row < rows, column < d_out
    here = live[:, None] & inside[None, :]
    off = tl.load(residual + row[:, None] * d_out + column[None, :], mask=here, other=0.0).to(ACC)
    total = tl.zeros((ROWS, BLOCK_D), ACC)
    for back in range(n_prefixes):
        p = n_prefixes - 1 - back
        total += 2 * tl.load(grad_errors + row * n_prefixes + p, mask=live, other=0.0)[:, None] * off
        to = out + (row * n_prefixes + p)[:, None] * d_out + column[None, :]
        tl.store(to, total.to(out.dtype.element_ty), mask=here)
        last = tl.load(prefixes + p)
        first = tl.where(p > 0, tl.load(prefixes + tl.maximum(p - 1, 0)), last)  # nothing stands before the first
        slots = tl.zeros((ROWS, BLOCK_D), ACC)
        slots = add_slots(
            slots, values, indices, W, row, column, live, inside, first, last, k, d_sae, d_out, ACC, UNROLL
        )
        off -= slots


@triton.jit
def passed_on(
    dot, value, more, position, on, ACC: tl.constexpr, HAS_MORE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """What of the gradient of a value reaches the encoder, with `more` of it from elsewhere."""
    if HAS_MORE:
        dot += tl.load(more + position, mask=on, other=0.0).to(ACC)
    if RELU:
        dot = tl.where(value == 0, 0.0, dot)
    return dot


@triton.jit
def grad_chunks(
    grad, scale, values, W, x, more, budget_of, order, latent_of, begins, ends, slot_of,
    grad_values, sums, slots, sums_x, slots_x, totals, slot_totals, d_sae, d, budgets,
    K: tl.constexpr, ACC: tl.constexpr, HAS_BUDGETS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_DOTS: tl.constexpr,
    HAS_X: tl.constexpr, HAS_MORE: tl.constexpr, RELU: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One chunk of one latent, one slice of columns of the decoder's gradient; with HAS_DOTS, where a row is one slice,
    the gradient of the values, and with HAS_X that of the encoder, from the same read of W[latent] and grad."""
    number = tl.program_id(0)
    latent = tl.load(latent_of + number)
    begin, end = tl.load(begins + number), tl.load(ends + number)
    slot = tl.load(slot_of + number)
    if latent < d_sae:
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = column < d
        part = tl.zeros((ENTRIES, BLOCK_D), ACC)
        part_x = tl.zeros((ENTRIES, BLOCK_D), ACC)
        weight_part = tl.zeros((ENTRIES,), ACC)
        if HAS_DOTS:
            w = tl.load(W + latent * d + column, mask=inside, other=0.0).to(ACC)
        ahead = positions_at(begin, end, order, ENTRIES)
        for at in range(begin, end, ENTRIES):
            position, on = ahead, at + tl.arange(0, ENTRIES) < end
            ahead = positions_at(at + ENTRIES, end, order, ENTRIES)
            n = (position // K).to(tl.int64)
            value = tl.load(values + position, mask=on, other=0.0).to(ACC)
            here = on[:, None] & inside[None, :]
            at_row = n
            if HAS_BUDGETS:
                at_row = n * budgets + tl.load(budget_of + position % K, mask=on, other=0)
            row = tl.load(grad + at_row[:, None] * d + column[None, :], mask=here, other=0.0).to(ACC)
            factor = tl.full((ENTRIES,), 1, ACC)
            if HAS_SCALE:
                factor = tl.load(scale + n, mask=on, other=0.0)
            part += (value * factor)[:, None] * row
            if HAS_DOTS:
                dot = tl.sum(row * w[None, :], 1) * factor
                if HAS_X:
                    dot = passed_on(dot, value, more, position, on, ACC, HAS_MORE, RELU)
                    seen = tl.load(x + n[:, None] * d + column[None, :], mask=here, other=0.0).to(ACC)
                    part_x += dot[:, None] * seen
                    weight_part += dot
                else:
                    tl.store(grad_values + position, dot.to(grad_values.dtype.element_ty), mask=on)
        put_sums(part, sums, slots, latent, slot, column, inside, d)
        if HAS_X:
            put_sums(part_x, sums_x, slots_x, latent, slot, column, inside, d)
            put_total(weight_part, totals, slot_totals, latent, slot)


@triton.jit(do_not_specialize=["rows"])
def add_rows(
    rows_of, weights, parts, rows, apart, d, ACC: tl.constexpr, HAS_WEIGHTS: tl.constexpr, SHARE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """parts [programs, d]: the sum of SHARE rows times their weights, of every `apart`-th row of d elements."""
    first = tl.program_id(0).to(tl.int64) * SHARE
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    total = tl.zeros((ROWS, BLOCK_D), ACC)
    for start in range(0, SHARE, ROWS):
        row = first + start + tl.arange(0, ROWS)
        on = row < rows
        here = on[:, None] & inside[None, :]
        more = tl.load(rows_of + (row * apart)[:, None] * d + column[None, :], mask=here, other=0.0).to(ACC)
        if HAS_WEIGHTS:
            more *= tl.load(weights + row, mask=on, other=0.0)[:, None]
        total += more
    tl.store(parts + tl.program_id(0).to(tl.int64) * d + column, tl.sum(total, 0), mask=inside)


def sae_loss(
    x: Tensor, values: Tensor, indices: Tensor, W: Tensor, b: Tensor | None, prefixes: list[int]
) -> tuple[Tensor, Tensor]:
    """x [N, d], values, indices [N, k], W [d_sae, d], b [d] -> errors [N, P], residual [N, d]."""
    residual = torch.empty_like(x, memory_format=torch.contiguous_format)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.numel() == 0:
        return x.new_zeros(x.shape[0], len(prefixes), dtype=wide), residual
    plan = tuning.decode_plan(W.shape[1], W.element_size())
    grid = triton.cdiv(x.shape[0], plan.ROWS), triton.cdiv(x.shape[1], plan.BLOCK_D)
    errors = x.new_empty(grid[1], x.shape[0], len(prefixes), dtype=wide)
    decode_errors[grid](
        x.contiguous(), values.contiguous(), indices.contiguous(), W.contiguous(),
        None if b is None else b.contiguous(), _filled(prefixes, [1] * len(prefixes), x), residual, errors,
        *values.shape, *W.shape, len(prefixes), HAS_BIAS=b is not None,
        ACC=accumulator(W.dtype), ROWS=plan.ROWS, BLOCK_D=plan.BLOCK_D, UNROLL=plan.UNROLL, num_warps=plan.warps,
    )  # fmt: skip
    return errors.sum(0), residual


def prefix_grads(
    grad_errors: Tensor, residual: Tensor, values: Tensor, indices: Tensor, W: Tensor, prefixes: list[int]
) -> Tensor:
    """grad_errors [N, P], residual [N, d] -> [N, P, d]: the gradient of what each prefix adds to the one before."""
    out = residual.new_empty(residual.shape[0], len(prefixes), residual.shape[1])
    if out.numel() > 0:
        plan = tuning.decode_plan(W.shape[1], W.element_size())
        prefix_gradients[(triton.cdiv(out.shape[0], plan.ROWS), triton.cdiv(W.shape[1], plan.BLOCK_D))](
            grad_errors.contiguous(), residual.contiguous(), values.contiguous(), indices.contiguous(), W.contiguous(),
            _filled(prefixes, [1] * len(prefixes), residual), out, *values.shape, *W.shape, len(prefixes),
            ACC=accumulator(W.dtype), ROWS=plan.ROWS, BLOCK_D=plan.BLOCK_D, UNROLL=plan.UNROLL, num_warps=plan.warps,
        )  # fmt: skip
    return out


def backward(
    grad: Tensor, scale: Tensor | None, values: Tensor, indices: Tensor, W: Tensor, prefixes: list[int],
    x: Tensor | None, centre: Tensor | None, more: Tensor | None, relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """grad [N, P, d] times scale [N] -> dvalues [N, k] and dW, db of the decoder; with x [N, d_in] dW, db of the
    encoder instead of dvalues."""
    db = _summed(grad, scale).to(W.dtype)
    nothing = W.new_empty(0, values.shape[1]), W.new_empty(0, 0), W.new_empty(0)
    d_in = None if x is None else x.shape[1]
    if grad.numel() == 0 or d_in == 0:
        encoder = nothing[1:] if x is None else (W.new_zeros(W.shape[0], d_in), W.new_zeros(W.shape[0]))
        return torch.zeros_like(values) if x is None else nothing[0], torch.zeros_like(W), db, *encoder
    chunks = Chunks(indices, W.shape[0], tuning.chunk_length(indices.numel(), W.shape[1], W.element_size()))
    fused = W.shape[1] <= tuning.widest_row(W.element_size()) and d_in in (None, W.shape[1])
    if fused:
        grads = _fused(grad, scale, values, W, prefixes, x, more, relu, chunks)
    else:
        grads = _in_turn(grad, scale, values, indices, W, prefixes, x, more, relu, chunks)
    dvalues, dW, dW_enc, db_enc = grads
    if x is None:
        return dvalues, dW, db, *nothing[1:]
    if centre is not None:
        dW_enc = dW_enc.addr_(db_enc, centre, alpha=-1)
    return nothing[0], dW, db, dW_enc, db_enc


def _summed(grad: Tensor, scale: Tensor | None) -> Tensor:
    """The gradient [d] of what is added to every row, without a copy of grad."""
    (rows, budgets, d), grad = grad.shape, grad.contiguous()
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    if grad.numel() == 0:
        return grad.new_zeros(d, dtype=wide)
    plan = tuning.sums_plan(d, grad.element_size())
    parts = grad.new_empty(triton.cdiv(rows, _SHARE), d, dtype=wide)
    add_rows[(parts.shape[0], triton.cdiv(d, plan.BLOCK_D))](
        grad, scale, parts, rows, budgets, d, ACC=accumulator(grad.dtype), HAS_WEIGHTS=scale is not None,
        SHARE=_SHARE, ROWS=plan.ENTRIES, BLOCK_D=plan.BLOCK_D, num_warps=plan.warps,
    )  # fmt: skip
    return parts.sum(0)


def _fused(grad, scale, values, W, prefixes, x, more, relu, chunks: Chunks):
    """One kernel for all of them; without x, dvalues and dW alone."""
    d, plan = W.shape[1], tuning.sums_plan(W.shape[1], W.element_size())
    has_dots = d <= tuning.widest_row(W.element_size())
    dvalues = values.new_full(values.shape, float("nan")) if x is None and has_dots else None
    dW, (slots, slot_totals) = torch.empty_like(W, memory_format=torch.contiguous_format), chunks.empty_slots(W)
    dW_enc = db_enc = slots_x = None
    if x is not None:
        dW_enc, db_enc, slots_x = torch.empty_like(dW), W.new_empty(W.shape[0]), torch.empty_like(slots)
        x = x.contiguous()
    lengths = [b - a for a, b in zip([0, *prefixes], prefixes, strict=False)]
    budget_of = _filled(list(range(len(prefixes))), lengths, grad) if len(prefixes) > 1 else None
    grad_chunks[(chunks.programs, triton.cdiv(d, plan.BLOCK_D))](
        grad.contiguous(), scale, values.contiguous(), W.contiguous(), x, None if more is None else more.contiguous(),
        budget_of, *chunks.of_programs, dvalues, dW, slots, dW_enc, slots_x, db_enc, slot_totals, W.shape[0], d,
        len(prefixes), K=chunks.k, ACC=accumulator(W.dtype), HAS_BUDGETS=len(prefixes) > 1,
        HAS_SCALE=scale is not None, HAS_DOTS=has_dots, HAS_X=x is not None,
        HAS_MORE=more is not None, RELU=relu, ENTRIES=plan.ENTRIES, BLOCK_D=plan.BLOCK_D, num_warps=plan.warps,
        maxnreg=tuning.MOST_REGISTERS,
    )  # fmt: skip
    chunks.join(dW, None, slots, slot_totals, plan)
    if x is not None:
        chunks.join(dW_enc, db_enc, slots_x, slot_totals, plan)
    return dvalues, dW, dW_enc, db_enc


def _in_turn(grad, scale, values, indices, W, prefixes, x, more, relu, chunks: Chunks):
    """Rows too long for one program: the gradient of the values first, then each sum over the same order."""
    ends = list(zip([0, *prefixes], prefixes, strict=False))
    parts = [grad_values(grad[:, p], indices[:, a:b].contiguous(), W) for p, (a, b) in enumerate(ends)]
    dvalues = torch.cat(parts, 1)
    dvalues = dvalues if scale is None else dvalues * scale.unsqueeze(1)
    _, dW, _, _ = _fused(grad, scale, values, W, prefixes, None, None, relu, chunks)
    if x is None:
        return dvalues.to(values.dtype), dW, None, None
    dvalues = dvalues if more is None else dvalues + more
    weights = torch.where(values == 0, 0, dvalues) if relu else dvalues
    dW_enc, db_enc, _ = latent_sums(
        indices, weights.to(values.dtype), x, W.shape[0], with_totals=True,
        chunks=chunks if x.shape[1] == W.shape[1] else None,
    )  # fmt: skip
    return None, dW, dW_enc, db_enc


def _filled(numbers: list[int], lengths: list[int], like: Tensor) -> Tensor:
    """int32 on like's device, without a copy from the host: a graph capture must not meet one."""
    runs = [torch.full((n,), v, dtype=torch.int32, device=like.device) for v, n in zip(numbers, lengths, strict=True)]
    return torch.cat(runs)
