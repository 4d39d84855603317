"""Mean and variance per dimension of rows that pass by, in fp64, the same bits however often a run was interrupted."""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2**18  # numbers at a time: what is in flight stays in the cache


@dataclass(frozen=True, eq=False)
class Moments:
    """rows that count; mean [d] and squares [d] (sums of squared deviations from the mean), fp64."""

    rows: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Moments":
        """Moments of x [rows, d], blockwise; rows with NaN or Inf do not count."""
        d = x.shape[1]
        total = cls(0, torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64))
        blocks = x.split(max(1, BLOCK // max(d, 1)))
        # one workspace for all blocks: first use of new memory costs ten times the arithmetic
        work = torch.empty(len(blocks[0]), d, dtype=torch.float64)
        for block in blocks:
            total = total.merge(_block(work[: len(block)].copy_(block)))
        return total

    def merge(self, other: "Moments") -> "Moments":
        """Both together (Chan, Golub and LeVeque 1979); the order of merging decides the last bits."""
        rows = self.rows + other.rows
        if not self.rows or not other.rows:
            return other if other.rows else self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.rows / rows)
        return Moments(rows, mean, self.squares + other.squares + delta.square() * (self.rows * other.rows / rows))

    @property
    def var(self) -> Tensor:
        """[d] fp64, divided by the number of rows."""
        return self.squares / max(self.rows, 1)

    def to_json(self) -> dict[str, object]:
        return {"rows": self.rows, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @classmethod
    def from_json(cls, facts: dict[str, object]) -> "Moments":
        mean, squares = (torch.tensor(facts[name], dtype=torch.float64) for name in ("mean", "squares"))
        return cls(facts["rows"], mean, squares)


def _block(x: Tensor) -> Moments:
    """Moments of x [rows, d] fp64, which is overwritten."""
    mean = _sum(x) / max(len(x), 1)
    if not torch.isfinite(mean).all():
        x = x[x.isfinite().all(1)]
        mean = _sum(x) / max(len(x), 1)
    return Moments(len(x), mean, _sum(x.sub_(mean).square_()))


def _sum(x: Tensor) -> Tensor:
    # a product with ones: faster than sum(0)
    return (x.new_ones(1, len(x)) @ x).squeeze(0)
