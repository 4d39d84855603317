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
def positions_at(at, end, order, ENTRIES: tl.constexpr):
    """Where the next entries of a chunk stand in [N, k]: asked for a turn ahead, as their rows have to wait for it."""
    entry = at + tl.arange(0, ENTRIES)
    return tl.load(order + entry, mask=entry < end, other=0)


@triton.jit
def sum_chunks(
    rows_of, weights, W, order, latent_of, begins, ends, slot_of, dots, sums, totals, slots, slot_totals, d_sae, d,
    K: tl.constexpr, ACC: tl.constexpr, HAS_TOTALS: tl.constexpr, HAS_DOTS: tl.constexpr, ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One chunk of one latent, one slice of columns: to `sums` if it is the latent's only chunk, else to its slot.

    K is a constant: positions are divided by it, which takes a compiler that knows it three instructions.
    """
    number = tl.program_id(0)
    latent = tl.load(latent_of + number)
    begin, end = tl.load(begins + number), tl.load(ends + number)
    slot = tl.load(slot_of + number)
    if latent < d_sae:
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = column < d
        part = tl.zeros((ENTRIES, BLOCK_D), ACC)
        weight_part = tl.zeros((ENTRIES,), ACC)
        if HAS_DOTS:
            w = tl.load(W + latent * d + column, mask=inside, other=0.0).to(ACC)
        ahead = positions_at(begin, end, order, ENTRIES)
        for at in range(begin, end, ENTRIES):
            position, on = ahead, at + tl.arange(0, ENTRIES) < end
            ahead = positions_at(at + ENTRIES, end, order, ENTRIES)
            weight = tl.load(weights + position, mask=on, other=0.0).to(ACC)
            here = on[:, None] & inside[None, :]
            n = (position // K).to(tl.int64)
            row = tl.load(rows_of + n[:, None] * d + column[None, :], mask=here, other=0.0).to(ACC)
            part += weight[:, None] * row
            weight_part += weight
            if HAS_DOTS:
                tl.store(dots + position, tl.sum(row * w[None, :], 1).to(dots.dtype.element_ty), mask=on)
        put_sums(part, sums, slots, latent, slot, column, inside, d)
        if HAS_TOTALS:
            if tl.program_id(1) == 0:
                put_total(weight_part, totals, slot_totals, latent, slot)


@triton.jit
def put_sums(part, sums, slots, latent, slot, column, inside, d):
    """part [entries, columns], added up, to the latent's row of `sums` or to the slot, if it has one."""
    total = tl.sum(part, 0)
    if slot < 0:
        tl.store(sums + latent * d + column, total.to(sums.dtype.element_ty), mask=inside)
    else:
        tl.store(slots + slot * d + column, total, mask=inside)


@triton.jit
def put_total(part, totals, slot_totals, latent, slot):
    """The same of the weights [entries]."""
    total = tl.sum(part, 0)
    if slot < 0:
        tl.store(totals + latent, total.to(totals.dtype.element_ty))
    else:
        tl.store(slot_totals + slot, total)


@triton.jit
def join_chunks(
    split_latents, chunks, first_slot, sums, totals, slots, slot_totals, d_sae, d,
    ACC: tl.constexpr, HAS_TOTALS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the slots of one of the latents that have more than one chunk, in order."""
    latent = tl.load(split_latents + tl.program_id(0))
    if latent < d_sae:
        count = tl.load(chunks + latent)
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

    indices [N, k]; chunk: entries of one program. All sizes are known without asking the device: there are as many
    programs as any order needs, and those without a chunk, of latent d_sae, leave at once.
    """

    def __init__(self, indices: Tensor, d_sae: int, chunk: int) -> None:
        self.d_sae, self.k, entries = d_sae, indices.shape[1], indices.numel()
        ranked, order = narrowed(indices.reshape(-1), d_sae).sort(stable=True)
        index = torch.int32 if entries < 2**31 else torch.int64
        self.order = order.to(index)
        latents = torch.arange(d_sae + 1, dtype=ranked.dtype, device=ranked.device)
        starts = torch.searchsorted(ranked, latents)
        # every latent has one: it writes the zeros
        self.counts = ((starts.diff() + (chunk - 1)) // chunk).clamp(min=1)
        split = torch.where(self.counts > 1, self.counts, 0)
        self.first_slot, self.slots = split.cumsum(0) - split, 2 * entries // chunk
        # of each program: its latent, its entries, and the slot of their sum where the latent has several chunks
        self.programs = d_sae + entries // chunk
        last, number = self.counts.cumsum(0), torch.arange(self.programs, device=ranked.device)
        self.latent_of = torch.searchsorted(last, number, right=True)
        known = self.latent_of.clamp(max=d_sae - 1)
        place = number - (last - self.counts)[known]
        begins = starts[known] + place * chunk
        self.begins, self.ends = begins.to(index), torch.minimum(begins + chunk, starts[known + 1]).to(index)
        self.slot_of = torch.where(split[known] > 0, self.first_slot[known] + place, -1)
        self.splits = max(1, entries // chunk)  # latents of more than one chunk, at most
        nth = torch.arange(1, self.splits + 1, device=ranked.device)
        self.split_latents = torch.searchsorted((split > 0).cumsum(0), nth)

    @property
    def of_programs(self) -> tuple[Tensor, ...]:
        """What a program asks for first."""
        return self.order, self.latent_of, self.begins, self.ends, self.slot_of

    def join(self, sums: Tensor, totals: Tensor | None, slots: Tensor, slot_totals: Tensor, plan: tuning.SumsPlan):
        """Adds the slots of the latents that were split to `sums` [d_sae, d] and `totals` [d_sae]."""
        join_chunks[(self.splits, triton.cdiv(sums.shape[1], plan.BLOCK_D))](
            self.split_latents, self.counts, self.first_slot, sums, totals, slots, slot_totals, *sums.shape,
            ACC=accumulator(sums.dtype), HAS_TOTALS=totals is not None, BLOCK_D=plan.BLOCK_D, num_warps=plan.warps,
        )  # fmt: skip

    def empty_slots(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Partial sums of rows [N, d] and of their weights."""
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        return rows.new_empty(self.slots, rows.shape[-1], dtype=wide), rows.new_empty(self.slots, dtype=wide)


def narrowed(indices: Tensor, d_sae: int) -> Tensor:
    """indices [entries] in the shortest dtype that holds them: a radix sort goes over every byte. What is out of range
    stays so."""
    dtype = torch.int16 if d_sae < 2**15 else torch.int32 if d_sae < 2**31 else torch.int64
    return indices if indices.dtype.itemsize <= dtype.itemsize else indices.clamp(-1, d_sae).to(dtype)


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
    nothing = entries * d * d_sae == 0
    sums = rows.new_zeros(d_sae, d) if nothing else rows.new_empty(d_sae, d)
    totals = rows.new_zeros(d_sae) if with_totals else None
    dots = None if W is None else rows.new_full(indices.shape, float("nan") if d else 0.0)
    if nothing:
        return sums, totals, dots
    plan = tuning.sums_plan(d, rows.element_size())
    c = chunks or Chunks(indices, d_sae, chunk or tuning.chunk_length(entries, d, rows.element_size()))
    slots, slot_totals = c.empty_slots(rows)
    sum_chunks[(c.programs, triton.cdiv(d, plan.BLOCK_D))](
        rows.contiguous(), weights.contiguous(), None if W is None else W.contiguous(),
        *c.of_programs, dots, sums, totals, slots, slot_totals, d_sae, d,
        K=c.k, ACC=accumulator(rows.dtype), HAS_TOTALS=with_totals, HAS_DOTS=W is not None,
        ENTRIES=plan.ENTRIES, BLOCK_D=plan.BLOCK_D, num_warps=plan.warps, maxnreg=tuning.MOST_REGISTERS,
    )  # fmt: skip
    c.join(sums, totals, slots, slot_totals, plan)
    return sums, totals, dots
