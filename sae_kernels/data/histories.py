"""Histories: every user's items as one flat tensor and offsets; batches as multi-hot rows, bags or padded sequences."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..recommenders._bags import distinct, keep, multi_hot, pad_left, row_ids, take


@dataclass(frozen=True, eq=False)
class Histories:
    """User u has the items flat[offsets[u]:offsets[u + 1]], in time order where the source has one.

    flat [nnz] int64, codes in [0, n_items); offsets [n_users + 1] int64, from 0, never falling. A row may be empty.
    Raises TypeError or ValueError that names the argument.
    """

    flat: Tensor
    offsets: Tensor
    n_items: int

    def __post_init__(self) -> None:
        for name in ("flat", "offsets"):
            t = getattr(self, name)
            if not isinstance(t, Tensor) or t.dtype != torch.int64 or t.dim() != 1:
                came = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
                raise TypeError(f"Histories: {name} must be a 1-d int64 tensor, got {came}")
        offsets = self.offsets
        ends_fit = offsets.numel() > 0 and offsets[0] == 0 and offsets[-1] == self.flat.numel()
        if not ends_fit or bool((offsets.diff() < 0).any()):
            raise ValueError(f"Histories: offsets must rise from 0 to len(flat) = {self.flat.numel()} without falling")
        if self.flat.numel():
            low, high = (int(v) for v in self.flat.aminmax())
            if low < 0 or high >= self.n_items:
                raise ValueError(f"Histories: flat must be in [0, n_items = {self.n_items}), got {low} to {high}")

    @classmethod
    def from_pairs(
        cls, users: Tensor, items: Tensor, n_users: int, n_items: int, order: Tensor | None = None
    ) -> "Histories":
        """users, items [n] int64 codes; order [n]: a user's rows are sorted by it, else they keep their given order."""
        if users.shape != items.shape or (order is not None and order.shape != users.shape):
            raise ValueError("Histories.from_pairs: users, items and order must have one length")
        if users.numel() and (int(users.min()) < 0 or int(users.max()) >= n_users):
            raise ValueError(f"Histories.from_pairs: users must be in [0, n_users = {n_users})")
        if order is not None:
            by_order = order.argsort(stable=True)
            users, items = users[by_order], items[by_order]
        by_user = users.argsort(stable=True)
        offsets = torch.zeros(n_users + 1, dtype=torch.int64)
        torch.cumsum(torch.bincount(users, minlength=n_users), 0, out=offsets[1:])
        return cls(items[by_user], offsets, n_items)

    @classmethod
    def from_lists(cls, lists: Iterable[Sequence[int]], n_items: int) -> "Histories":
        rows = [list(row) for row in lists]
        lengths = torch.tensor([0, *(len(row) for row in rows)], dtype=torch.int64)
        flat = torch.tensor([item for row in rows for item in row], dtype=torch.int64)
        return cls(flat, lengths.cumsum(0), n_items)

    @classmethod
    def one_item_each(cls, n_items: int) -> "Histories":
        """Row i holds item i alone: the pass that shows which latents an item fires."""
        return cls(torch.arange(n_items), torch.arange(n_items + 1), n_items)

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def __getitem__(self, row: int) -> Tensor:
        """The items of one user, [length] int64."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} histories")
        row %= len(self)
        return self.flat[int(self.offsets[row]) : int(self.offsets[row + 1])]

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    def row_ids(self) -> Tensor:
        """The user of every entry of flat, [nnz] int64."""
        return row_ids(self.offsets)

    def select(self, rows: Tensor) -> "Histories":
        """The users `rows` ([B] int64), in that order."""
        return Histories(*take(self.flat, self.offsets, self._rows(rows)), self.n_items)

    def bags(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(flat, offsets [B + 1]) of the users `rows`, of all without: what a model's encode_histories takes."""
        return (self.flat, self.offsets) if rows is None else take(self.flat, self.offsets, self._rows(rows))

    def batch(self, rows: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Multi-hot rows [B, n_items] of the users `rows`, of all without."""
        return multi_hot(*self.bags(rows), self.n_items, dtype)

    def padded(self, rows: Tensor | None = None, length: int = 200) -> Tensor:
        """[B, length] int64: the last items as code + 1, padding 0 on the left."""
        if length < 1:
            raise ValueError(f"Histories.padded: length must be at least 1, got {length}")
        return pad_left(*self.bags(rows), length)

    def sub_histories(
        self, rows: Tensor, keep: tuple[float, float] = (0.2, 1.0), generator: torch.Generator | None = None
    ) -> "Histories":
        """Random parts of the users' histories: a share drawn from U(keep) per row, each item kept with that chance.

        A row that comes out empty stays, empty. Order is kept. Same generator state, same result.
        """
        low, high = keep
        if not 0 <= low <= high <= 1:
            raise ValueError(f"sub_histories: keep must be (low, high) with 0 <= low <= high <= 1, got {keep}")
        part = self.select(rows)
        share = torch.rand(len(part), generator=generator).mul_(high - low).add_(low)
        kept = torch.rand(part.flat.numel(), generator=generator) < share[part.row_ids().cpu()]
        return part.filter(kept.to(part.flat.device))

    def filter(self, kept: Tensor) -> "Histories":
        """The same users with only the entries of flat where kept [nnz] bool is True."""
        if kept.dtype != torch.bool or kept.shape != self.flat.shape:
            came = f"{kept.dtype} {tuple(kept.shape)}"
            raise ValueError(f"Histories.filter: kept must be bool [{self.flat.numel()}], got {came}")
        return Histories(*keep(self.flat, self.offsets, kept), self.n_items)

    def distinct(self) -> "Histories":
        """The same users with every item once, where it first stands."""
        flat, offsets = distinct(self.flat, self.offsets, self.n_items)
        return self if flat is self.flat else Histories(flat, offsets, self.n_items)

    def users_per_item(self) -> Tensor:
        """How many users have each item, however often: [n_items] int64."""
        return torch.bincount(self.distinct().flat, minlength=self.n_items)

    def to(self, device: torch.device | str) -> "Histories":
        return Histories(self.flat.to(device), self.offsets.to(device), self.n_items)

    def _rows(self, rows: Tensor) -> Tensor:
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.dim() != 1:
            came = getattr(rows, "dtype", type(rows).__name__)
            raise TypeError(f"Histories: rows must be a 1-d int64 tensor, got {came}")
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= len(self)):
            raise IndexError(f"Histories: rows must be in [0, {len(self)}), got {int(rows.min())} to {int(rows.max())}")
        return rows.to(self.flat.device)
