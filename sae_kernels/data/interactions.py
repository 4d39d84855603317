"""Interactions: who took which item, with codes, original ids, titles and named concepts."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .histories import Histories


@dataclass(frozen=True, eq=False)
class Concepts:
    """names: one per concept; labels [n_items, n_concepts] bool: item i has concept c."""

    names: list[str]
    labels: Tensor

    def __post_init__(self) -> None:
        if self.labels.dtype != torch.bool or self.labels.dim() != 2 or self.labels.shape[1] != len(self.names):
            came = f"{self.labels.dtype} {tuple(self.labels.shape)}"
            raise ValueError(f"Concepts: labels must be bool [n_items, {len(self.names)}], got {came}")


@dataclass(eq=False)
class Interactions:
    """One row per (user, item): users, items [n] int64 codes in [0, n_users) and [0, n_items).

    user_ids, item_ids: the original id of every code (ints or texts). order [n] or None: sorts a user's rows in time.
    item_titles: one per item, or None. concepts: Concepts or None. user_taste [n_users, n_concepts] and transitions
    [n_concepts, n_concepts]: the truth that the simulator planted, else None. filtered: what each filter removed.
    """

    name: str
    users: Tensor
    items: Tensor
    user_ids: list
    item_ids: list
    order: Tensor | None = None
    item_titles: list[str] | None = None
    concepts: Concepts | None = None
    user_taste: Tensor | None = None
    transitions: Tensor | None = None
    filtered: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, other in (("item_titles", self.item_titles), ("concepts", self.concepts and self.concepts.labels)):
            if other is not None and len(other) != self.n_items:
                raise ValueError(f"Interactions: {name} has {len(other)} rows for {self.n_items} items")

    @property
    def n_users(self) -> int:
        return len(self.user_ids)

    @property
    def n_items(self) -> int:
        return len(self.item_ids)

    def __len__(self) -> int:
        return self.users.numel()

    def histories(self) -> Histories:
        """The items of every user, in time order where there is one."""
        return Histories.from_pairs(self.users, self.items, self.n_users, self.n_items, self.order)

    def describe(self) -> str:
        """One line: size, density, order, concepts, and what every filter removed."""
        size = f"{len(self):,} interactions of {self.n_users:,} users with {self.n_items:,} items"
        density = 100 * len(self) / max(self.n_users * self.n_items, 1)
        concepts = f"{len(self.concepts.names)} concepts" if self.concepts else "no concepts"
        removed = "; ".join(f"{what}: {count:,} removed" for what, count in self.filtered.items()) or "nothing removed"
        time = "in time order" if self.order is not None else "no time order"
        return f"{self.name}: {size} ({density:.2f} % of all pairs), {time}, {concepts}; {removed}"
