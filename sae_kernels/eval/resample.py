"""Bootstrap resamples as weights: how often every row stands in each of them (Efron 1979)."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**22  # weights of one block of resamples: 32 MiB


def resample_weights(rows: int, resamples: int, groups: Tensor | None = None, seed: int = 0) -> Iterator[Tensor]:
    """Blocks [b, rows] float64 whose b add up to `resamples`; none for 0 rows.

    groups [rows] int64: what is drawn with replacement where rows belong together; the rows themselves where None.
    """
    generator = torch.Generator().manual_seed(seed)
    names, place = (None, None) if groups is None else groups.cpu().unique(return_inverse=True)
    units = rows if names is None else names.numel()
    left, block = resamples if rows else 0, max(BLOCK // max(rows, 1), 1)
    one = torch.ones((), dtype=torch.float64)
    while left:
        count = min(block, left)
        drawn = torch.randint(units, (count, units), generator=generator)
        weights = torch.zeros(count, units, dtype=torch.float64).scatter_add_(1, drawn, one.expand(count, units))
        yield weights if place is None else weights[:, place]
        left -= count
