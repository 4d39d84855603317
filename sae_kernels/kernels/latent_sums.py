"""Weight gradients per latent in Triton: entries sorted by latent, summed in one fixed order, no atomics.

sums[f] = sum over the entries (n, j) with indices[n, j] = f of weights[n, j] rows[n]. A latent's entries stand in the
order of their rows and are summed in chunks of fixed length, so a latent that fires on every row occupies many
programs; the chunks of one latent are added in order afterwards. Where a row fits one program, the same read gives
<rows[n], W[f]>, the gradient of the entry's value.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .sparse_decode import accumulator


@triton.jit
def chunk_of(number, latent, starts, first_chunk, chunk):
    """The entries [begin, end) of a program's chunk, and which one of its latent's it is."""
    place = number - tl.load(first_chunk + latent)
    begin = tl.load(starts + latent) + place * chunk
    return begin, tl.minimum(begin + chunk, tl.load(starts + latent + 1)), place


@triton.jit
def positions_at(at, end, order, ENTRIES: tl.constexpr):
    """Where the next entries of a chunk stand in [N, k], and which of them there are."""
    entry = at + tl.arange(0, ENTRIES)
    on = entry < end
    return tl.load(order + entry, mask=on, other=0), on


@triton.jit(do_not_specialize=["chunk"])
def sum_chunks(
    rows_of, weights, W, order, starts, first_chunk, chunks, first_slot, latent_of,
    dots, sums, totals, slots, slot_totals, chunk, d_sae, k, d,
    ACC: tl.constexpr, HAS_TOTALS: tl.constexpr, HAS_DOTS: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One chunk of one latent, one slice of columns: to `sums` if it is the latent's only chunk, else to its slot."""
    number = tl.program_id(0)
    latent = tl.load(latent_of + number)
    if latent < d_sae:
        begin, end, place = chunk_of(number, latent, starts, first_chunk, chunk)
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = column < d
        part = tl.zeros((ENTRIES, BLOCK_D), ACC)
        weight_part = tl.zeros((ENTRIES,), ACC)
        if HAS_DOTS:
            w = tl.load(W + latent * d + column, mask=inside, other=0.0).to(ACC)
        for at in range(begin, end, ENTRIES):
            position, on = positions_at(at, end, order, ENTRIES)
            weight = tl.load(weights + position, mask=on, other=0.0).to(ACC)
            here = on[:, None] & inside[None, :]
            row = tl.load(rows_of + (position // k)[:, None] * d + column[None, :], mask=here, other=0.0).to(ACC)
            part += weight[:, None] * row
            weight_part += weight
            if HAS_DOTS:
                tl.store(dots + position, tl.sum(row * w[None, :], 1).to(dots.dtype.element_ty), mask=on)
        total, weight_total = tl.sum(part, 0), tl.sum(weight_part, 0)
        if tl.load(chunks + latent) > 1:
            slot = tl.load(first_slot + latent) + place
            tl.store(slots + slot * d + column, total, mask=inside)
            if HAS_TOTALS:
                if tl.program_id(1) == 0:
                    tl.store(slot_totals + slot, weight_total)
        else:
            tl.store(sums + latent * d + column, total.to(sums.dtype.element_ty), mask=inside)
            if HAS_TOTALS:
                if tl.program_id(1) == 0:
                    tl.store(totals + latent, weight_total.to(totals.dtype.element_ty))


@triton.jit
def join_chunks(
    chunks, first_slot, sums, totals, slots, slot_totals, d,
    ACC: tl.constexpr, HAS_TOTALS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the slots of every latent that has more than one chunk, in order."""
    latent = tl.program_id(0).to(tl.int64)
    count = tl.load(chunks + latent)
    if count > 1:
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = column < d
        first = tl.load(first_slot + latent)
        total = tl.zeros((BLOCK_D,), ACC)
        weight_total = tl.sum(tl.zeros((1,), ACC), 0)
        for slot in range(first, first + count):
            total += tl.load(slots + slot * d + column, mask=inside, other=0.0)
            if HAS_TOTALS:
                weight_total += tl.load(slot_totals + slot)
        tl.store(sums + latent * d + column, total.to(sums.dtype.element_ty), mask=inside)
        if HAS_TOTALS:
            if tl.program_id(1) == 0:
                tl.store(totals + latent, weight_total.to(totals.dtype.element_ty))


class Chunks:
    """One stable sort of the entries by latent, cut into chunks: it serves every sum over them.

    indices [N, k]; chunk: entries of one program. All sizes are known without asking the device: `programs` covers the
    chunks of any order, and those beyond the real number leave at once; `slots` partial sums of split latents.
    """

    def __init__(self, indices: Tensor, d_sae: int, chunk: int) -> None:
        self.chunk, self.d_sae, self.k = chunk, d_sae, indices.shape[1]
        ranked, self.order = indices.reshape(-1).sort(stable=True)
        self.starts = torch.searchsorted(ranked, torch.arange(d_sae + 1, dtype=ranked.dtype, device=ranked.device))
        # every latent has one: it writes the zeros
        self.counts = ((self.starts.diff() + (chunk - 1)) // chunk).clamp(min=1)
        ends = self.counts.cumsum(0)
        split = torch.where(self.counts > 1, self.counts, 0)
        self.first_chunk, self.first_slot = ends - self.counts, split.cumsum(0) - split
        self.programs = d_sae + indices.numel() // chunk
        self.slots = 2 * indices.numel() // chunk
        self.latent_of = torch.searchsorted(ends, torch.arange(self.programs, device=ends.device), right=True)

    def join(self, sums: Tensor, totals: Tensor | None, slots: Tensor, slot_totals: Tensor, plan: tuning.SumsPlan):
        """Adds the slots of the latents that were split to `sums` [d_sae, d] and `totals` [d_sae]."""
        grid = (self.d_sae, triton.cdiv(sums.shape[1], plan.BLOCK_D))
        join_chunks[grid](
            self.counts, self.first_slot, sums, totals, slots, slot_totals, sums.shape[1],
            ACC=accumulator(sums.dtype), HAS_TOTALS=totals is not None, BLOCK_D=plan.BLOCK_D, num_warps=plan.warps,
        )  # fmt: skip

    def empty_slots(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Partial sums of rows [N, d] and of their weights."""
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        return rows.new_empty(self.slots, rows.shape[-1], dtype=wide), rows.new_empty(self.slots, dtype=wide)


def latent_sums(
    indices: Tensor, weights: Tensor, rows: Tensor, d_sae: int, *,
    with_totals: bool = False, W: Tensor | None = None, chunk: int | None = None, chunks: Chunks | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """indices, weights [N, k], rows [N, d] -> sums [d_sae, d]; sums of the weights [d_sae]; dots [N, k] with W [d_sae,
    d].

    The last two where asked for: W is allowed up to d = tuning.widest_row. Entries whose index is out of range are left
    out of the sums, and their dots are NaN. chunk: entries summed by one program; None lets the workspace decide.
    chunks: the order of these very indices, where it is at hand.
    """
    entries, d = indices.numel(), rows.shape[1]
    sums = rows.new_zeros(d_sae, d) if entries * d == 0 else rows.new_empty(d_sae, d)
    totals = rows.new_zeros(d_sae) if with_totals else None
    dots = None if W is None else rows.new_full(indices.shape, float("nan") if d else 0.0)
    if entries * d == 0:
        return sums, totals, dots
    plan = tuning.sums_plan(d, rows.element_size())
    c = chunks or Chunks(indices, d_sae, chunk or tuning.chunk_length(entries, d, rows.element_size()))
    slots, slot_totals = c.empty_slots(rows)
    sum_chunks[(c.programs, triton.cdiv(d, plan.BLOCK_D))](
        rows.contiguous(), weights.contiguous(), None if W is None else W.contiguous(),
        c.order, c.starts, c.first_chunk, c.counts, c.first_slot, c.latent_of, dots, sums, totals, slots, slot_totals,
        c.chunk, d_sae, c.k, d, ACC=accumulator(rows.dtype), HAS_TOTALS=with_totals, HAS_DOTS=W is not None,
        ENTRIES=plan.ENTRIES, BLOCK_D=plan.BLOCK_D, num_warps=plan.warps,
    )  # fmt: skip
    c.join(sums, totals, slots, slot_totals, plan)
    return sums, totals, dots
