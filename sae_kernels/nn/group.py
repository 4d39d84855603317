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


def mean_of_those_with_rows(
    t: Tensor, x: Tensor, weight: Tensor | None, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The mean of t [] over the processes whose x [N, d] has rows, of weight [N] above 0; and 1 where there is such a
    process, else 0."""
    # a tensor's answer, also in a compiled graph whose number of rows is a symbol
    some = t.new_ones(x.shape[0]).sum().clamp(max=1) if weight is None else (weight > 0).any().to(t.dtype)
    total = summed(torch.stack([t * some, some]), group)
    return total[0] / total[1].clamp(min=1), total[1].clamp(max=1)
