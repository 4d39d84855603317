"""Which concept every user is steered towards."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.histories import Histories
from ..data.interactions import Concepts


@dataclass(frozen=True)
class Goals:
    """names and labels [n_items, n_concepts] bool: the concepts; concept [n_users] int64: the one of every user."""

    names: list[str]
    labels: Tensor
    concept: Tensor

    def wanted(self, top: Tensor) -> Tensor:
        """top [n_users, k] item codes -> bool: the listed item has the user's concept; False for -1."""
        return self.labels[top.clamp(min=0), self.concept.unsqueeze(1)] & (top >= 0)

    def unseen(self, histories: Histories) -> Tensor:
        """Items of the user's concept that are not in the history, [n_users] int64."""
        histories = histories.distinct()
        owner = histories.row_ids()
        seen = torch.zeros(len(histories), dtype=torch.int64)
        seen.index_add_(0, owner, self.labels[histories.flat, self.concept[owner]].long())
        return self.labels.sum(0)[self.concept] - seen

    def groups(self) -> list[tuple[int, Tensor]]:
        """(concept, its user rows), for every concept that a user has."""
        return [(int(c), (self.concept == c).nonzero().squeeze(1)) for c in self.concept.unique()]


def one_goal(items: Tensor | Sequence[int], n_users: int, n_items: int, name: str = "concept") -> Goals:
    """All users towards one concept; items: bool [n_items], or the codes of its items."""
    return Goals([name], _members(items, n_items).unsqueeze(1), torch.zeros(n_users, dtype=torch.int64))


def over_represented(concepts: Concepts, histories: Histories, targets: Histories) -> tuple[Goals, Tensor]:
    """Each user towards the concept whose share of the targets exceeds its share of the history most.

    As Spisak et al. 2026 evaluate: what the user turned to. Returns the goals and the user rows [kept] they are for: a
    user whose targets have no concept is left out, so that len(histories) - len(rows) users are. Equal excess goes to
    the earlier concept. Raises ValueError where nobody is left.
    """
    if concepts.labels.shape[0] != histories.n_items:
        raise ValueError(
            f"over_represented: {concepts.labels.shape[0]} items in concepts, {histories.n_items} in histories"
        )
    shares = []
    for part in (targets, histories):
        counts = torch.zeros(len(part), len(concepts.names), dtype=torch.float64)
        counts.index_add_(0, part.row_ids(), concepts.labels[part.flat].double())
        shares.append(counts / part.lengths.clamp(min=1).unsqueeze(1))
    excess = (shares[0] - shares[1]).masked_fill(shares[0] == 0, -torch.inf)
    most = excess.amax(1, keepdim=True)
    first = torch.where(excess == most, torch.arange(excess.shape[1]), excess.shape[1]).amin(1)
    rows = (most.squeeze(1) > -torch.inf).nonzero().squeeze(1)
    if rows.numel() == 0:
        raise ValueError(f"over_represented: none of the {len(targets)} users has a target with a concept")
    return Goals(concepts.names, concepts.labels, first[rows]), rows


def _members(items: Tensor | Sequence[int], n_items: int) -> Tensor:
    op, items = "concept_items", torch.as_tensor(items).cpu()
    if items.dtype == torch.bool:
        if items.shape != (n_items,):
            raise ValueError(f"{op} must be bool [n_items = {n_items}], got {tuple(items.shape)}")
    elif items.dim() != 1 or (items.numel() and items.is_floating_point()):
        raise TypeError(f"{op} must be bool or 1-d integers, got {items.dtype} {tuple(items.shape)}")
    elif items.numel() and not 0 <= int(items.min()) <= int(items.max()) < n_items:
        raise ValueError(f"{op} must be in [0, n_items = {n_items}), got {int(items.min())} to {int(items.max())}")
    else:
        items = torch.zeros(n_items, dtype=torch.bool).index_fill_(0, items.long(), True)
    if not bool(items.any()):
        raise ValueError(f"{op} names no item")
    return items
