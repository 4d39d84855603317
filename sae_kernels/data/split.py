"""Splits of users and of each user's items; seeded, and what they leave out is counted."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .histories import Histories


@dataclass(frozen=True)
class TargetSplit:
    """What a model may see of each user and what it has to find.

    inputs, targets: Histories of the same users; rows [len(inputs)] int64: their rows before the split; dropped: users
    left out because nothing would remain as input or as target.
    """

    inputs: Histories
    targets: Histories
    rows: Tensor
    dropped: int


def split_users(n_users: int, held_out: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(train rows, held-out rows), both sorted int64; held-out: round(n_users * held_out), at least 1.

    n_users: a number, or anything with a length or an n_users (Histories, Interactions).
    """
    if not isinstance(n_users, int):
        n_users = n_users.n_users if hasattr(n_users, "n_users") else len(n_users)
    if not 0 < held_out < 1:
        raise ValueError(f"split_users: held_out must be between 0 and 1, got {held_out}")
    if n_users < 2:
        raise ValueError(f"split_users: needs at least 2 users, got {n_users}")
    count = min(max(round(n_users * held_out), 1), n_users - 1)
    order = torch.randperm(n_users, generator=torch.Generator().manual_seed(seed))
    return order[count:].sort().values, order[:count].sort().values


def split_targets(histories: Histories, fraction: float = 0.2, seed: int = 0) -> TargetSplit:
    """ceil(fraction * n) random items of every user become targets, the rest stay input, in their order.

    A user to whom no input (or no item at all) would be left is dropped and counted.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"split_targets: fraction must be between 0 and 1, got {fraction}")
    lengths = histories.lengths
    # 0.2 * 15 is 3.0000000000000004 in floating point: the small term keeps its ceiling at 3
    n_targets = torch.tensor([math.ceil(fraction * n - 1e-9) for n in lengths.tolist()], dtype=torch.int64)
    noise = torch.rand(histories.flat.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    owner = histories.row_ids()
    # a row number plus a random fraction sorts every user's own items into random order
    by_noise = (owner + noise).argsort()
    rank = torch.empty_like(owner)
    rank[by_noise] = torch.arange(owner.numel()) - histories.offsets[:-1][owner]
    return _split(histories, rank < n_targets[owner])


def leave_last_out(histories: Histories) -> TargetSplit:
    """The last item of every sequence is the target, what stands before it the input; call it twice for validation too.

    A user with fewer than 2 items is dropped and counted.
    """
    last = torch.zeros(histories.flat.numel(), dtype=torch.bool)
    last[histories.offsets[1:][histories.lengths > 0] - 1] = True
    return _split(histories, last)


def _split(histories: Histories, is_target: Tensor) -> TargetSplit:
    inputs = histories.filter(~is_target)
    targets = histories.filter(is_target)
    rows = ((inputs.lengths > 0) & (targets.lengths > 0)).nonzero().squeeze(1)
    return TargetSplit(inputs.select(rows), targets.select(rows), rows, len(histories) - rows.numel())
