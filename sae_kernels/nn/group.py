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
