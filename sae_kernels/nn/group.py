"""Sums over the processes of a group; without a group a tensor is its own sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def summed(t: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of t over the processes of `group`, the same bits on each; t itself, not a copy, where there is none."""
    if group is None:
        return t
    total = t.detach().clone()
    torch.distributed.all_reduce(total, group=group)
    return total


def mean_of_those_with_rows(t: Tensor, rows: int, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The mean of t over the processes that have rows, and 1 where there is any, else 0: both []."""
    some = t.new_full((), float(rows > 0))
    total = summed(torch.stack([t * some, some]), group)
    return total[0] / total[1].clamp(min=1), total[1].clamp(max=1)
