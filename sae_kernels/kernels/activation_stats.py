"""ActivationStats in Triton: the same bits as on the CPU, whatever the order in which the atomics arrive, as all that
is added is an integer and all else is a maximum under a total order. Nothing here waits for the device.

values [N, k], indices [N, k]. An entry fires where its value is not 0 and its magnitude is below 2^22; entries whose
index is out of range fire nowhere. Bound by the atomics of an entry in the L2 cache: about six of eight bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # entries of one program; twice as many spill
CHUNK = 128  # candidates of a latent in flight
LARGEST_TOP = 64  # kept examples of a latent: their ranks are counted pair by pair

_LIMIT = tl.constexpr(2.0**22)
_BASE = tl.constexpr(2.0**32)
_ROUND = tl.constexpr(2.0**52)  # added and taken away again, it rounds what is smaller to an integer, ties to even


@triton.jit
def load_entries(values, indices, entry, entries, d_sae):
    """Values as float64, latents, and which of these entries fire, are to be rejected, or have no latent."""
    on = entry < entries
    value = tl.load(values + entry, mask=on, other=0.0).to(tl.float64)
    latent = tl.load(indices + entry, mask=on, other=0).to(tl.int64)
    known = (latent >= 0) & (latent < d_sae)
    usable = tl.abs(value) < _LIMIT  # False for NaN
    some = on & known & (value != 0)
    value = tl.where(usable, value, 0.0)
    return value, tl.where(known, latent, 0), some & usable, some & (usable == 0), on & (known == 0)


@triton.jit
def add_limbs(cells, value, negative, fire):
    """Adds float64 values of [0, 2^44), each rounded once to a multiple of 2^-64, to four limbs of 32 bits each."""
    whole = tl.floor(value)
    fraction = (value - whole) * _BASE
    upper = tl.floor(fraction)
    lower = ((fraction - upper) * _BASE + _ROUND) - _ROUND
    units = whole.to(tl.int64)
    limbs = (lower.to(tl.int64), upper.to(tl.int64), units & 0xFFFFFFFF, units >> 32)
    for number in tl.static_range(4):
        limb = limbs[number]
        tl.atomic_add(cells + number, tl.where(negative, -limb, limb), mask=fire & (limb != 0), sem="relaxed")


@triton.jit(do_not_specialize=["entries", "row"])
def add_entries(
    values, indices, numbers, counts, sums, maximum, last, rejected, foreign, entries, row, d_sae, k,
    HAS_NUMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts, limbs of the sums, maxima, last rows. The last rows come first: few of the others then raise `last`."""
    block = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0)
    entry = block * BLOCK + tl.arange(0, BLOCK)
    value, latent, fire, reject, unknown = load_entries(values, indices, entry, entries, d_sae)
    number = row + entry // k
    if HAS_NUMBERS:
        number = tl.load(numbers + entry // k, mask=entry < entries, other=0)
    tl.atomic_add(counts + latent, tl.full((BLOCK,), 1, tl.int64), mask=fire, sem="relaxed")
    add_limbs(sums + latent * 8, tl.abs(value), value < 0, fire)
    add_limbs(sums + latent * 8 + 4, value * value, value != value, fire)
    higher = fire & (value > tl.load(maximum + latent, mask=fire, other=0.0))  # a stale read costs an atomic, no more
    tl.atomic_max(maximum + latent, value, mask=higher, sem="relaxed")
    later = fire & (number > tl.load(last + latent, mask=fire, other=0))
    tl.atomic_max(last + latent, number, mask=later, sem="relaxed")
    tl.atomic_add(rejected + latent, tl.full((BLOCK,), 1, tl.int64), mask=reject, sem="relaxed")
    strays = tl.sum(unknown.to(tl.int64), 0)
    if strays > 0:
        tl.atomic_add(foreign, strays, sem="relaxed")


@triton.jit
def carry_limbs(sums, cells, BLOCK: tl.constexpr):
    """Three limbs of each sum brought back to [0, 2^32), what is over goes to the next."""
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    on = cell < cells
    carried = tl.zeros((BLOCK,), tl.int64)
    for number in tl.static_range(4):
        limb = tl.load(sums + cell * 4 + number, mask=on, other=0) + carried
        if number < 3:
            carried = limb >> 32
            limb = limb & 0xFFFFFFFF
        tl.store(sums + cell * 4 + number, limb, mask=on)


@triton.jit(do_not_specialize=["entries"])
def count_bins(values, indices, table, entries, d_sae, columns, first, shift, BLOCK: tl.constexpr):
    """table [d_sae, columns]: exponent and leading mantissa bits of |value| number its bin."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value, latent, fire, _, _ = load_entries(values, indices, entry, entries, d_sae)
    bits = tl.abs(value).to(tl.int64, bitcast=True)
    number = tl.minimum(tl.maximum((bits >> shift) - first, 0), columns - 1)
    tl.atomic_add(table + latent * columns + number, tl.full((BLOCK,), 1, tl.int64), mask=fire, sem="relaxed")


@triton.jit
def count_pairs(
    values, indices, position, table, k, d_sae, m, HAS_POSITION: tl.constexpr, A: tl.constexpr, B: tl.constexpr
):
    """table [m, m]: every ordered pair of a row's firing entries, A of them against all."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * A + tl.arange(0, A)
    one = place_of(values, indices, position, row, slot, k, d_sae, HAS_POSITION)
    for start in range(0, k, B):
        other = place_of(values, indices, position, row, start + tl.arange(0, B), k, d_sae, HAS_POSITION)
        both = (one >= 0)[:, None] & (other >= 0)[None, :]
        cell = table + one[:, None] * m + other[None, :]
        tl.atomic_add(cell, tl.full((A, B), 1, tl.int64), mask=both, sem="relaxed")


@triton.jit
def place_of(values, indices, position, row, slot, k, d_sae, HAS_POSITION: tl.constexpr):
    """Places in the table of co-occurrences; -1 where the entry does not fire or its latent is not among them."""
    end = (row + 1) * k
    value, latent, fire, _, _ = load_entries(values, indices, tl.where(slot < k, row * k + slot, end), end, d_sae)
    if HAS_POSITION:
        latent = tl.load(position + latent, mask=fire, other=-1)
    return tl.where(fire, latent, -1)


@triton.jit(do_not_specialize=["entries"])
def mark_candidates(values, indices, top_values, keys, entries, d_sae, n, BLOCK: tl.constexpr):
    """keys [entries] int32: the latent where the entry reaches the last of that latent's kept values, else d_sae."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value, latent, fire, _, _ = load_entries(values, indices, entry, entries, d_sae)
    reaches = fire & (value >= tl.load(top_values + latent * n + (n - 1), mask=fire, other=0.0))
    tl.store(keys + entry, tl.where(reaches, latent, d_sae).to(tl.int32), mask=entry < entries)


@triton.jit
def merge_candidates(values, ids, order, starts, top_values, top_ids, k, n, NP: tl.constexpr, CHUNK: tl.constexpr):
    """One latent: its candidates replace the worst kept ones, value by value; then the kept ones are ranked.

    A kept one is worse where its value is smaller, or equal with a higher id; empty places are worst of all.
    """
    latent = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    if begin < end:
        lane = tl.arange(0, NP)
        held = lane < n
        none = 0x7FFFFFFFFFFFFFFF
        value = tl.load(top_values + latent * n + lane, mask=held, other=float("inf"))
        name = tl.load(top_ids + latent * n + lane, mask=held, other=0)
        name = tl.where(value == float("-inf"), none, name)
        for start in range(begin, end, CHUNK):
            at = start + tl.arange(0, CHUNK)
            entry = tl.load(order + at, mask=at < end, other=0)
            fresh = tl.load(values + entry, mask=at < end, other=0.0).to(tl.float64)
            fresh = tl.where(at < end, fresh, float("-inf"))
            fresh_name = tl.load(ids + entry // k, mask=at < end, other=0)
            more = tl.max(fresh, 0) >= tl.min(value, 0)
            while more:
                best = tl.max(fresh, 0)
                best_name = tl.min(tl.where(fresh == best, fresh_name, none), 0)
                worst = tl.min(value, 0)
                worst_name = tl.max(tl.where(value == worst, name, -none), 0)
                beats = (best > worst) | ((best == worst) & (best_name < worst_name))
                more = beats & (best > float("-inf"))
                if more:
                    out = tl.min(tl.where((value == worst) & (name == worst_name), lane, NP), 0)
                    value, name = tl.where(lane == out, best, value), tl.where(lane == out, best_name, name)
                    chosen = (fresh == best) & (fresh_name == best_name)
                    first = tl.min(tl.where(chosen, tl.arange(0, CHUNK), CHUNK), 0)
                    fresh = tl.where(tl.arange(0, CHUNK) == first, float("-inf"), fresh)
        before = (value[None, :] > value[:, None]) | (
            (value[None, :] == value[:, None]) & (name[None, :] < name[:, None])
        )
        same = (value[None, :] == value[:, None]) & (name[None, :] == name[:, None]) & (lane[None, :] < lane[:, None])
        rank = tl.sum(((before | same) & held[None, :]).to(tl.int32), 1)
        tl.store(top_values + latent * n + rank, value, mask=held)
        tl.store(top_ids + latent * n + rank, tl.where(name == none, -1, name), mask=held)


@triton.jit(do_not_specialize=["entries"])
def mark_fired(
    values, indices, weight, marks, entries, d_sae, K: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """marks [d_sae] uint8: 1 for the latents of values other than 0. Most programs find the mark made: they look, as
    writes to one address wait for each other."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    on = entry < entries
    latent = tl.load(indices + entry, mask=on, other=0).to(tl.int64)
    fires = on & (tl.load(values + entry, mask=on, other=0.0) != 0) & (latent >= 0) & (latent < d_sae)
    if HAS_WEIGHT:
        fires = fires & (tl.load(weight + entry // K, mask=on, other=0.0) > 0)
    made = tl.load(marks + latent, mask=fires, other=1)
    tl.store(marks + latent, tl.full((BLOCK,), 1, tl.uint8), mask=fires & (made == 0))


def fired(values: Tensor, indices: Tensor, weight: Tensor | None, d_sae: int) -> Tensor:
    """values, indices [N, k], weight [N] -> [d_sae] bool: latents of values other than 0, in rows of weight above 0."""
    marks = torch.zeros(d_sae, dtype=torch.uint8, device=values.device)
    if values.numel() > 0:
        mark_fired[(triton.cdiv(values.numel(), 2 * BLOCK),)](
            values.contiguous(), indices.contiguous(), None if weight is None else weight.contiguous(), marks,
            values.numel(), d_sae, K=values.shape[1], HAS_WEIGHT=weight is not None, BLOCK=2 * BLOCK,
        )  # fmt: skip
    return marks.bool()


def update(
    values: Tensor, indices: Tensor, counts: Tensor, sums: Tensor, maximum: Tensor, last: Tensor, rejected: Tensor,
    foreign: Tensor, row: int, numbers: Tensor | None,
) -> None:  # fmt: skip
    """The state as in ops/reference_stats.py; foreign [1] int64 counts entries without a latent. numbers [N] int64: of
    the rows, or None where they count up from `row`.
    """
    if values.numel() > 0:
        add_entries[(triton.cdiv(values.numel(), BLOCK),)](
            values, indices, numbers, counts, sums, maximum, last, rejected, foreign, values.numel(), row,
            counts.shape[0], values.shape[1], HAS_NUMBERS=numbers is not None, BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
        cells = 2 * counts.shape[0]
        carry_limbs[(triton.cdiv(cells, BLOCK),)](sums, cells, BLOCK=BLOCK)


def histogram(values: Tensor, indices: Tensor, table: Tensor, low: int, bits: int) -> None:
    """table [d_sae, bins + 2] int64."""
    if values.numel() > 0:
        count_bins[(triton.cdiv(values.numel(), BLOCK),)](
            values, indices, table, values.numel(), *table.shape, ((1023 + low) << bits) - 1, 52 - bits, BLOCK=BLOCK
        )


def top(values: Tensor, indices: Tensor, ids: Tensor, top_values: Tensor, top_ids: Tensor) -> None:
    """ids [N] int64; top_values [d_sae, n] float64, top_ids [d_sae, n] int64, n up to LARGEST_TOP.

    The entries that reach their latent's last kept value are sorted by latent, and one program merges those of one.
    All memory is asked for before anything is changed.
    """
    entries, (d_sae, n) = values.numel(), top_values.shape
    if entries == 0:
        return
    keys = torch.empty(entries, dtype=torch.int32, device=values.device)
    mark_candidates[(triton.cdiv(entries, BLOCK),)](values, indices, top_values, keys, entries, d_sae, n, BLOCK=BLOCK)
    ranked, order = keys.sort(stable=True)
    starts = torch.searchsorted(ranked, torch.arange(d_sae + 1, dtype=torch.int32, device=ranked.device))
    merge_candidates[(d_sae,)](
        values, ids, order, starts, top_values, top_ids, values.shape[1], n,
        NP=triton.next_power_of_2(n), CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip


def cooccurrence(values: Tensor, indices: Tensor, position: Tensor | None, table: Tensor) -> None:
    """position [d_sae] int64: place in the table or -1, None: the latent itself; table [m, m] int64."""
    (rows, k), m = values.shape, table.shape[0]
    if values.numel() > 0:
        d_sae = m if position is None else position.shape[0]
        count_pairs[(rows, triton.cdiv(k, 16))](
            values, indices, position, table, k, d_sae, m, HAS_POSITION=position is not None, A=16, B=32
        )
