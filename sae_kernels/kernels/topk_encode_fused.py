"""topk_encode for short rows (d_in up to 512) in Triton: a product whose epilogue keeps only what can be among the k
largest.

Latents are taken in phases, each an even sample of what is left: first some through slabs (the head, and every S-th),
then the new multiples of S / GROWTH, and so on. A row's k-th best after one phase is its threshold in the next: fixed
within a phase, only rising, so the result depends neither on the order of the tiles nor on that of the atomics. The
epilogue looks at the maxima of groups of strided columns, and copies the groups that reach the threshold into the row's
buffer.

The products of different phases may round a pre-activation differently in its last bit, so latents whose
pre-activations are equal only in exact arithmetic need not rank by index.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .product import product
from .topk_select import _ABS, _MIN64, _NONE, _RELU, Selection, absorb, make_keys, push

Screen = Callable[[Tensor, int, int, int], None]


@triton.jit
def latent_at(column, step, GROWTH: tl.constexpr):
    """The column-th multiple of step that is no multiple of GROWTH * step."""
    return step * (GROWTH * (column // (GROWTH - 1)) + column % (GROWTH - 1) + 1)


@triton.jit
def above(total, threshold, threshold_step, latent, inside, ACTIVATION: tl.constexpr):
    """Which pre-activations [..., latents] are above their latent's threshold; NaN always is."""
    limit = tl.load(threshold + latent * threshold_step, mask=inside, other=0.0)
    score = tl.abs(total) if ACTIVATION == _ABS else total
    return ((score > limit) | (score != score)) & inside


@triton.jit
def group_maxima(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr):
    """[ROWS, COLUMNS >> LEVELS]: maxima, NaN kept, over the columns that are equal modulo COLUMNS >> LEVELS."""
    for level in tl.static_range(LEVELS):
        pairs = tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS >> (level + 1))), (0, 2, 1))
        low, high = tl.split(pairs)
        tile = tl.maximum(low, high, propagate_nan=tl.PropagateNan.ALL)
    return tile


@triton.jit(do_not_specialize=["rows", "columns", "step"])
def filter_product(
    x, W, bias, threshold, passed, keys, groups, names, fills,
    rows, columns, d_in, d_sae, head, step, threshold_step, k, room,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
    GROWTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LEVELS: tl.constexpr,
    TILES: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """x [rows, d_in] times the `columns` latents of one phase.

    A group of G = 2^LEVELS pre-activations that may hold one of the row's k best goes to groups [rows, room, G], its
    number to names [rows, room]; fills [rows] counts them, also those for which there was no room. Each x and W element
    is read d_sae / BLOCK_N and rows / BLOCK_M times, from L2: programs go through TILES row tiles per column tile.
    HAS_THRESHOLD: what is not above its latent's threshold has the lowest score instead; passed [rows] counts the
    others, but for those of the head.
    """
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    block = tl.program_id(0) // (TILES * tiles_n)
    inner = tl.program_id(0) % (TILES * tiles_n)
    height = tl.minimum(tiles_m - block * TILES, TILES)
    row = (block * TILES + inner % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = inner // height
    latent = latent_at(tile * BLOCK_N + tl.arange(0, BLOCK_N), step, GROWTH)
    live, inside = row < rows, latent < d_sae
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + latent, mask=inside, other=0.0).to(tl.float32)[None, :]
    for start in range(0, d_in, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        near = d < d_in
        a = tl.load(x + row.to(tl.int64)[:, None] * d_in + d[None, :], mask=live[:, None] & near[None, :], other=0.0)
        w = tl.load(
            W + latent.to(tl.int64)[None, :] * d_in + d[:, None], mask=inside[None, :] & near[:, None], other=0.0
        )
        total = tl.dot(a, w, total, input_precision=PRECISION)

    if HAS_THRESHOLD:
        passes = above(total, threshold, threshold_step, latent, inside & (latent >= head), ACTIVATION)
        total = tl.where(passes, total, float("-inf") if ACTIVATION == _NONE else 0.0)
        tl.atomic_add(passed + row, tl.sum(passes.to(tl.int32), 1), mask=live, sem="relaxed")
    G: tl.constexpr = 1 << LEVELS
    WIDTH: tl.constexpr = BLOCK_N // G
    best = group_maxima(tl.abs(total) if ACTIVATION == _ABS else total, BLOCK_M, BLOCK_N, LEVELS)
    order = (tl.load(keys + row.to(tl.int64) * P + (k - 1), mask=live, other=0) >> 32).to(tl.int32)
    bound = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    reaches = best >= bound[:, None]
    if ACTIVATION == _RELU or HAS_THRESHOLD:  # the lowest scores beyond the head lose to those of the head
        reaches = reaches & (best > (float("-inf") if ACTIVATION == _NONE else 0.0))
    reaches = (reaches | (best != best)) & live[:, None]
    place = tl.atomic_add(fills + row[:, None] + tl.zeros((1, WIDTH), tl.int32), 1, mask=reaches, sem="relaxed")
    reaches = reaches & (place < room)
    at = row.to(tl.int64)[:, None] * room + place
    tl.store(names + at, tile * WIDTH + tl.zeros_like(place) + tl.arange(0, WIDTH)[None, :], mask=reaches)
    member = tl.arange(0, G)[None, :, None]
    tl.store(groups + at[:, None, :] * G + member, tl.reshape(total, (BLOCK_M, G, WIDTH)), mask=reaches[:, None, :])


@triton.jit(do_not_specialize=["step"])
def take_groups(
    keys, counts, groups, names, fills, d_sae, head, step, k, room,
    ACTIVATION: tl.constexpr, GROWTH: tl.constexpr, BLOCK_N: tl.constexpr, LEVELS: tl.constexpr, AT_ONCE: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """The members of a row's groups above its k-th best key join its buffer; too many groups: an overflow."""
    G: tl.constexpr = 1 << LEVELS
    WIDTH: tl.constexpr = BLOCK_N // G
    row = tl.program_id(0)
    count = tl.load(fills + row)
    if count > room:
        tl.store(counts + row, P + 1)
    else:
        bound = tl.load(keys + row.to(tl.int64) * P + (k - 1))
        for start in range(0, count, AT_ONCE):
            group = start + tl.arange(0, AT_ONCE)
            at = row.to(tl.int64) * room + group
            name = tl.load(names + at, mask=group < count, other=0)
            member = tl.arange(0, G)[None, :]
            column = (name // WIDTH * BLOCK_N + name % WIDTH)[:, None] + member * WIDTH
            latent = latent_at(column, step, GROWTH)
            here = (group < count)[:, None] & (latent >= head) & (latent < d_sae)
            pre = tl.load(groups + at[:, None] * G + member, mask=here, other=0.0)
            key = tl.reshape(make_keys(pre, latent, here, ACTIVATION), (1, AT_ONCE * G))
            keep = tl.reshape(here, (1, AT_ONCE * G)) & (key > bound)
            push(keys, counts, row + tl.zeros((1,), tl.int32), key, keep, P)
    tl.store(fills + row, 0)


@triton.jit(do_not_specialize=["columns", "step"])
def rescan_product(
    x, W, bias, threshold, keys, counts, overflows, columns, d_in, d_sae, head, step, threshold_step, k,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_THRESHOLD: tl.constexpr, GROWTH: tl.constexpr,
    BLOCK_D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The rows that overflowed in this phase, exactly: their pre-activations again, and a running list of the best
    keys.
    """
    row = tl.program_id(0)
    if tl.load(counts + row) > P:
        lane = tl.arange(0, P)
        at = keys + row.to(tl.int64) * P + lane
        best = tl.load(at, mask=lane < k, other=_MIN64)
        for start in range(0, columns, P):
            latent = latent_at(start + lane, step, GROWTH)
            inside = (latent < d_sae) & (latent >= head)
            pre = tl.zeros((P, BLOCK_D), tl.float32)
            for first in range(0, d_in, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                a = tl.load(x + row.to(tl.int64) * d_in + d, mask=d < d_in, other=0.0).to(tl.float32)
                here = inside[:, None] & (d < d_in)[None, :]
                w = tl.load(W + latent.to(tl.int64)[:, None] * d_in + d[None, :], mask=here, other=0.0).to(tl.float32)
                pre += w * a[None, :]
            total = tl.sum(pre, 1)
            if HAS_BIAS:
                total += tl.load(bias + latent, mask=inside, other=0.0).to(tl.float32)
            if HAS_THRESHOLD:
                passes = above(total, threshold, threshold_step, latent, inside, ACTIVATION)
                total = tl.where(passes, total, float("-inf") if ACTIVATION == _NONE else 0.0)
            key = tl.where(inside, make_keys(total, latent, inside, ACTIVATION), _MIN64)
            best = absorb(best, key, k, lane, P)
        tl.store(at, best, mask=lane < k)
        tl.store(counts + row, k)
        tl.atomic_add(overflows, 1, sem="relaxed")


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as torch's setting says."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def phases(first_step: int, growth: int) -> list[int]:
    """The steps after the first: S / growth, ..., 1."""
    steps = []
    while first_step > 1:
        first_step //= growth
        steps.append(first_step)
    return steps


def topk_encode_fused(
    x, W, b, k, activation, values, indices,
    screen: Screen | None = None, threshold: Tensor | None = None, passed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Fills values and indices [N, k] for N >= 1 rows; returns how many rows were done over, on the device.

    threshold [1] or [d_sae] float32, passed [N] int32 and screen(slab, row, latent, step) come together: the screen
    does to a slab what the kernels do with the threshold, and adds the bias and to `passed`.
    """
    x, W = x.contiguous(), W.contiguous()
    d_in, d_sae = x.shape[1], W.shape[0]
    plan = tuning.fused_plan(d_in, d_sae, k, x.element_size())
    rows = min(x.shape[0], plan.rows)
    begin = -(-plan.head // plan.first_step) * plan.first_step
    W_sample = W[begin :: plan.first_step]
    space = x.new_empty(rows * max(plan.head, W_sample.shape[0]), dtype=torch.float32)
    best = Selection(rows, k, activation, b if screen is None else None, None, x.device)
    bias = None if b is None else b.contiguous()
    buffers = (
        x.new_empty(rows, plan.room, 1 << plan.LEVELS, dtype=torch.float32),
        x.new_empty(rows, plan.room, dtype=torch.int32),
        x.new_zeros(rows, dtype=torch.int32),
    )
    for top in range(0, x.shape[0], rows):
        part = x[top : top + rows]
        best.restart()
        for W_part, first, step in ((W[: plan.head], 0, 1), (W_sample, begin, plan.first_step)):
            pre = space[: part.shape[0] * W_part.shape[0]].view(part.shape[0], W_part.shape[0])
            product(part, W_part, pre)
            if screen is not None:
                screen(pre, top, first, step)
            best.slab(pre, first, step, aligned=W_part.shape[0] % 16 == 0)
            best.rank(part.shape[0])
        limits = (threshold, None if passed is None else passed[top : top + rows])
        for step in phases(plan.first_step, plan.GROWTH):
            _one_phase(part, W, bias, limits, step, plan, best, buffers)
            last = (values[top : top + rows], indices[top : top + rows]) if step == 1 else ()
            best.rank(part.shape[0], *last)
    return best.overflows


def _one_phase(x, W, bias, limits: tuple, step: int, plan: tuning.FusedPlan, best: Selection, buffers: tuple) -> None:
    (n, d_in), d_sae, k = x.shape, W.shape[0], best.k
    threshold, passed = limits
    threshold_step = int(threshold is not None and threshold.shape[0] > 1)
    columns = len(range(0, d_sae, step)) - len(range(0, d_sae, step * plan.GROWTH))
    common = {"ACTIVATION": best.activation, "GROWTH": plan.GROWTH, "P": best.plan.P}
    options = {"HAS_BIAS": bias is not None, "HAS_THRESHOLD": threshold is not None}
    tile = {"BLOCK_N": plan.BLOCK_N, "LEVELS": plan.LEVELS}
    filter_product[(triton.cdiv(n, plan.BLOCK_M) * triton.cdiv(columns, plan.BLOCK_N),)](
        x, W, bias, threshold, passed, best.keys, *buffers,
        n, columns, d_in, d_sae, plan.head, step, threshold_step, k, plan.room,
        PRECISION=precision(x.dtype), BLOCK_M=plan.BLOCK_M, BLOCK_D=plan.BLOCK_D, TILES=plan.TILES,
        num_warps=plan.warps, num_stages=plan.stages, **common, **options, **tile,
    )  # fmt: skip
    take_groups[(n,)](
        best.keys, best.counts, *buffers, d_sae, plan.head, step, k, plan.room, AT_ONCE=plan.AT_ONCE, num_warps=1,
        **common, **tile,
    )  # fmt: skip
    rescan_product[(n,)](
        x, W, bias, threshold, best.keys, best.counts, best.overflows, columns, d_in, d_sae, plan.head, step,
        threshold_step, k, BLOCK_D=tuning.RESCAN_D, num_warps=best.plan.rescan_warps, maxnreg=tuning.MOST_REGISTERS,
        **common, **options,
    )  # fmt: skip
