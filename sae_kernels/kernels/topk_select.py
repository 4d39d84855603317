"""The k largest of every row in Triton, from slabs of pre-activations that stay in the L2 cache and are read twice.

A latent competes by a 64-bit key: order bits of its score, then the lower index, then the sign that `abs` hides. Keys
are distinct, so every step keeps a set, whatever the order in which atomics arrive: two runs agree bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

RELU, NONE, ABS = 0, 1, 2

_MIN32 = tl.constexpr(-(2**31))  # order bits of a latent that may not compete; -inf stands above it
_MIN64 = tl.constexpr(-(2**63))  # no latent at all
_RELU, _NONE, _ABS = tl.constexpr(RELU), tl.constexpr(NONE), tl.constexpr(ABS)


@triton.jit
def make_keys(pre, latent, competes, ACTIVATION: tl.constexpr):
    """int64 keys of float32 pre-activations: NaN highest, -0 equal to 0, equal scores by the lower latent."""
    score = pre
    if ACTIVATION == _RELU:
        score = tl.where(pre <= 0, 0.0, pre)  # NaN stays
    elif ACTIVATION == _ABS:
        score = tl.abs(pre)
    else:
        score = tl.where(pre == 0, 0.0, pre)
    bits = score.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = tl.where(score != score, 0x7FFFFFFF, order)
    order = tl.where(competes, order, _MIN32)
    low = (0x7FFFFFFF - latent).to(tl.int64) << 1
    if ACTIVATION == _ABS:
        low |= (pre < 0).to(tl.int64)
    return (order.to(tl.int64) << 32) | low


@triton.jit
def read_keys(key, ACTIVATION: tl.constexpr):
    """Values and latents of keys."""
    order = (key >> 32).to(tl.int32)
    value = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    value = tl.where(order == _MIN32, 0.0, value)
    if ACTIVATION == _ABS:
        value = tl.where((key & 1) == 1, -value, value)
    return value, 0x7FFFFFFF - ((key >> 1).to(tl.int32) & 0x7FFFFFFF)


@triton.jit
def slab_keys(
    slab, bias, mask, row, live, column, columns, first, step,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Keys [ROWS, P] of slab columns `column`, which belong to the latents first + step * column."""
    inside = column < columns
    latent = first + step * column
    at = slab + row.to(tl.int64)[:, None] * columns + column[None, :]
    pre = tl.load(at, mask=live[:, None] & inside[None, :], other=0.0)
    if HAS_BIAS:
        pre += tl.load(bias + latent, mask=inside, other=0.0).to(tl.float32)[None, :]
    competes = inside
    if HAS_MASK:
        competes = tl.load(mask + latent, mask=inside, other=0) != 0
    key = make_keys(pre, latent[None, :], competes[None, :], ACTIVATION)
    return tl.where(inside[None, :], key, _MIN64)


@triton.jit
def push(keys, counts, row, key, keep, P: tl.constexpr):
    """Appends the kept keys [ROWS, N] to their rows' buffers; what does not fit is counted and not written."""
    place = tl.atomic_add(counts + row[:, None] + tl.zeros_like(key).to(tl.int32), 1, mask=keep, sem="relaxed")
    tl.store(keys + row.to(tl.int64)[:, None] * P + place, key, mask=keep & (place < P))


@triton.jit(do_not_specialize=["rows", "columns", "first", "filled"])
def filter_slab(
    slab, bias, mask, keys, counts, rows, columns, first, step, k, filled,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Appends to each row's buffer every key that can be among the k largest.

    slab [rows, columns] fp32, columns a multiple of 16 where ALIGNED; keys [rows, P] int64 with the k best so far in
    front where filled > 0; counts [rows].
    The k-th largest of P strided group maxima has k keys at or above it, so nothing below it is among the k largest.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    lane = tl.arange(0, P)
    if ALIGNED:
        columns = tl.multiple_of(columns, 16)
    best = tl.full((ROWS, P), _MIN64, tl.int64)
    for start in range(0, columns, P):
        key = slab_keys(slab, bias, mask, row, live, start + lane, columns, first, step, ACTIVATION, HAS_BIAS, HAS_MASK)
        best = tl.maximum(best, key)
    best = tl.sort(best, 1, descending=True)
    bound = tl.sum(tl.where(lane[None, :] == k - 1, best, 0), 1)
    if filled > 0:
        bound = tl.maximum(bound, tl.load(keys + row.to(tl.int64) * P + (k - 1), mask=live, other=0) + 1)
    for start in range(0, columns, P):
        key = slab_keys(slab, bias, mask, row, live, start + lane, columns, first, step, ACTIVATION, HAS_BIAS, HAS_MASK)
        keep = (key >= bound[:, None]) & (key != _MIN64) & live[:, None]
        push(keys, counts, row, key, keep, P)


@triton.jit
def absorb(best, key, k, lane, P: tl.constexpr):
    """The P largest of `best` [P], in descending order, and `key` [P]."""
    if tl.max(key) > tl.sum(tl.where(lane == k - 1, best, 0)):
        best = tl.sort(tl.maximum(best, tl.sort(key)), descending=True)
    return best


@triton.jit(do_not_specialize=["rows", "columns", "first", "filled"])
def rescan_slab(
    slab, bias, mask, keys, counts, overflows, rows, columns, first, step, k, filled,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The rows whose buffer overflowed, exactly: a running list of the best keys. Other rows leave at once."""
    row = tl.program_id(0)
    if tl.load(counts + row) > P:
        lane = tl.arange(0, P)
        at = keys + row.to(tl.int64) * P + lane
        best = tl.load(at, mask=lane < filled, other=_MIN64)
        for start in range(0, columns, P):
            one, live = row + tl.zeros((1,), tl.int32), tl.full((1,), 1, tl.int1)
            key = slab_keys(
                slab, bias, mask, one, live, start + lane, columns, first, step, ACTIVATION, HAS_BIAS, HAS_MASK
            )
            best = absorb(best, tl.reshape(key, (P,)), k, lane, P)
        tl.store(at, best, mask=lane < k)
        tl.store(counts + row, k)
        tl.atomic_add(overflows, 1, sem="relaxed")


@triton.jit(do_not_specialize=["rows"])
def rank(
    keys,
    counts,
    values,
    indices,
    rows,
    k,
    FINAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
):
    """Sorts each row's buffer and keeps the k largest; with FINAL they go out as values and indices [rows, k]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    lane = tl.arange(0, P)
    count = tl.load(counts + row, mask=live, other=0)
    at = row.to(tl.int64)[:, None] * P + lane[None, :]
    key = tl.load(keys + at, mask=lane[None, :] < count[:, None], other=_MIN64)
    key = tl.sort(key, 1, descending=True)
    chosen = live[:, None] & (lane[None, :] < k)
    if FINAL:
        value, latent = read_keys(key, ACTIVATION)
        out = row.to(tl.int64)[:, None] * k + lane[None, :]
        tl.store(values + out, value.to(values.dtype.element_ty), mask=chosen)
        tl.store(indices + out, latent, mask=chosen)
    else:
        tl.store(keys + at, key, mask=chosen)
        tl.store(counts + row, k, mask=live)


@triton.jit(do_not_specialize=["rows"])
def write_keys(
    slab, bias, mask, keys, rows, columns,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The keys of a whole slab, for a k beyond the buffers."""
    row = tl.program_id(0) + tl.zeros((1,), tl.int32)
    column = tl.program_id(1) * P + tl.arange(0, P)
    live = tl.full((1,), 1, tl.int1)
    key = slab_keys(slab, bias, mask, row, live, column, columns, 0, 1, ACTIVATION, HAS_BIAS, HAS_MASK)
    tl.store(keys + row.to(tl.int64)[:, None] * columns + column[None, :], key, mask=(column < columns)[None, :])


@triton.jit(do_not_specialize=["total"], do_not_specialize_on_alignment=["values", "indices"])
def write_codes(keys, values, indices, total, ACTIVATION: tl.constexpr, P: tl.constexpr):
    """Values and indices of sorted keys, element by element."""
    at = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    value, latent = read_keys(tl.load(keys + at, mask=at < total, other=0), ACTIVATION)
    tl.store(values + at, value.to(values.dtype.element_ty), mask=at < total)
    tl.store(indices + at, latent, mask=at < total)


class Selection:
    """The k best keys of each of up to `rows` rows, chunk after chunk of latents. `overflows` counts rows done over."""

    def __init__(self, rows: int, k: int, activation: int, b: Tensor | None, mask: Tensor | None, device) -> None:
        self.k, self.activation, self.filled = k, activation, 0
        self.plan = tuning.select_plan(k)
        self.keys = torch.empty(rows, self.plan.P, dtype=torch.int64, device=device)
        self.counts = torch.zeros(rows, dtype=torch.int32, device=device)
        self.overflows = torch.zeros(1, dtype=torch.int32, device=device)
        self.bias = None if b is None else b.contiguous()
        self.mask = None if mask is None else mask.contiguous().view(torch.uint8)
        self.options = {
            "ACTIVATION": activation,
            "HAS_BIAS": b is not None,
            "HAS_MASK": mask is not None,
            "P": self.plan.P,
        }

    def restart(self) -> None:
        self.counts.zero_()
        self.filled = 0

    def slab(self, pre: Tensor, first: int, step: int = 1, *, aligned: bool) -> None:
        """Takes in pre [rows, columns]: the latents first, first + step and so on.

        aligned: columns is a multiple of 16, and is so for any number of rows: it is part of a compile key.
        """
        rows, columns = pre.shape
        where = (pre, self.bias, self.mask, self.keys, self.counts)
        grid = (triton.cdiv(rows, self.plan.ROWS),)
        filter_slab[grid](
            *where,
            rows,
            columns,
            first,
            step,
            self.k,
            self.filled,
            ALIGNED=aligned,
            ROWS=self.plan.ROWS,
            num_warps=self.plan.warps,
            **self.options,
        )
        rescan_slab[(rows,)](
            *where,
            self.overflows,
            rows,
            columns,
            first,
            step,
            self.k,
            self.filled,
            num_warps=self.plan.rescan_warps,
            **self.options,
        )

    def rank(self, rows: int, values: Tensor | None = None, indices: Tensor | None = None) -> None:
        """Sorts; the last call gives the outputs."""
        rank[(triton.cdiv(rows, self.plan.ROWS),)](
            self.keys, self.counts, values, indices, rows, self.k, FINAL=values is not None, ACTIVATION=self.activation,
            ROWS=self.plan.ROWS, P=self.plan.P, num_warps=self.plan.warps,
        )  # fmt: skip
        self.filled = self.k
