"""Plain torch versions of the four kernels of ActivationStats: any device, and the same bits as the native ones.

values [N, k] float32 or float64 and indices [N, k] are checked by the caller. An entry counts as a firing where its
value is not 0 and its magnitude is below LIMIT; every state tensor is changed in place.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

LIMIT = 2.0**22
_BASE = 2**32
_PAIRS = 1 << 22


def fired(values: Tensor) -> Tensor:
    """values -> bool of the same shape; False for 0, NaN, Inf and anything of magnitude LIMIT or more."""
    return (values != 0) & (values.abs() < LIMIT)


@contextlib.contextmanager
def all_or_nothing(state: Iterable[Tensor]) -> Iterator[None]:
    """Around kernels that may run out of memory half way: the tensors are then as they were before."""
    before = [(t, t.clone()) for t in state]
    try:
        yield
    except BaseException:
        for t, old in before:
            t.copy_(old)
        raise


def carry(limbs: Tensor) -> Tensor:
    """limbs [..., 4] int64 of units 2^-64, 2^-32, 1, 2^32: the same number with three in [0, 2^32), in place."""
    for i in range(3):
        limbs[..., i + 1] += limbs[..., i] >> 32
        limbs[..., i] &= _BASE - 1
    return limbs


def to_float(limbs: Tensor) -> Tensor:
    """limbs [..., 4] in carried form -> [...] float64."""
    negative = limbs[..., 3:] < 0
    size = carry(torch.where(negative, -limbs, limbs)).double()
    total = ((size[..., 3] * _BASE + size[..., 2]) + size[..., 1] * 2.0**-32) + size[..., 0] * 2.0**-64
    return torch.where(negative.squeeze(-1), -total, total)


def _limbs(x: Tensor) -> Tensor:
    """x [M] float64, |x| < 2^44, rounded once to a multiple of 2^-64 (ties to even) -> [M, 4] int64."""
    size, sign = x.abs(), x.sign().long().unsqueeze(-1)
    whole = size.floor()
    fraction = (size - whole) * _BASE
    upper = fraction.floor()
    lower = ((fraction - upper) * _BASE).round()
    whole = whole.long()
    return torch.stack([lower.long(), upper.long(), whole & (_BASE - 1), whole >> 32], -1) * sign


def update(
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    sums: Tensor,
    maximum: Tensor,
    last: Tensor,
    rejected: Tensor,
    row: int,
    numbers: Tensor | None = None,
) -> None:
    """counts, last, rejected [d_sae] int64; sums [d_sae, 2, 4] int64; maximum [d_sae] float64; row: of values[0].

    numbers [N] int64: of the rows, where they do not count up from `row`.
    """
    d_sae, k = counts.shape[0], values.shape[1]
    fire = fired(values)
    rejected += torch.bincount(indices[(values != 0) & ~fire], minlength=d_sae)
    where, x = indices[fire].long(), values[fire].double()
    counts += torch.bincount(where, minlength=d_sae)
    sums[:, 0].index_add_(0, where, _limbs(x))
    sums[:, 1].index_add_(0, where, _limbs(x * x))
    carry(sums)
    maximum.scatter_reduce_(0, where, x, "amax")
    if numbers is None:
        numbers = torch.arange(row, row + values.shape[0], device=values.device)
    last.scatter_reduce_(0, where, numbers.unsqueeze(1).expand(-1, k)[fire], "amax")


def histogram(values: Tensor, indices: Tensor, table: Tensor, low: int, bits: int) -> None:
    """table [d_sae, bins + 2] int64: below 2^low, then 2^bits equal bins to each octave of |value|, then the rest."""
    fire = fired(values)
    size = values[fire].double().abs()
    # exponent and leading mantissa bits of a positive double, read as one integer, number the bins
    number = (size.view(torch.int64) >> (52 - bits)) - ((1023 + low) << bits) + 1
    flat = indices[fire].long() * table.shape[1] + number.clamp(0, table.shape[1] - 1)
    table.view(-1).index_add_(0, flat, torch.ones_like(flat))


def top(values: Tensor, indices: Tensor, ids: Tensor, top_values: Tensor, top_ids: Tensor) -> None:
    """ids [N] int64; top_values [d_sae, n] float64, top_ids [d_sae, n] int64: by value descending, id ascending."""
    d_sae, n = top_values.shape
    indices, x = indices.long(), values.double()
    keep = fired(values) & (x >= top_values[indices, -1])
    latents = torch.arange(d_sae, device=values.device).repeat_interleave(n)
    where = torch.cat([latents, indices[keep]])
    x = torch.cat([top_values.reshape(-1), x[keep]])
    ids = torch.cat([top_ids.reshape(-1), ids.unsqueeze(1).expand(-1, values.shape[1])[keep]])
    order = ids.argsort(stable=True)
    order = order[x[order].argsort(descending=True, stable=True)]
    order = order[where[order].argsort(stable=True)]
    where, x, ids = where[order], x[order], ids[order]
    sizes = torch.bincount(where, minlength=d_sae)
    place = torch.arange(where.shape[0], device=where.device) - (sizes.cumsum(0) - sizes)[where]
    first = place < n
    top_values.copy_(x[first].view(d_sae, n))
    top_ids.copy_(ids[first].view(d_sae, n))


def cooccurrence(values: Tensor, indices: Tensor, position: Tensor | None, table: Tensor) -> None:
    """position [d_sae] int64: place in the table or -1 (None: the latent itself); table [m, m] int64."""
    m, k = table.shape[0], values.shape[1]
    if k == 0:
        return
    for v, i in zip(values.split(max(1, _PAIRS // k**2)), indices.split(max(1, _PAIRS // k**2)), strict=True):
        place = i.long() if position is None else position[i.long()]
        place = torch.where(fired(v), place, -1)
        both = (place.unsqueeze(2) >= 0) & (place.unsqueeze(1) >= 0)
        flat = (place.unsqueeze(2) * m + place.unsqueeze(1))[both]
        table.view(-1).index_add_(0, flat, torch.ones_like(flat))
