"""The processes that train together: those that share a batch, and those that share the latents of one SAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from ..nn.group import summed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """data: the group whose processes take each a part of every batch; shard: the one whose processes hold each a part
    of the latents. None: this process alone. Raises ValueError where they have more than this process in common."""

    data: ProcessGroup | None = None
    shard: ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.data is None or self.shard is None:
            return
        shared = set.intersection(*(set(torch.distributed.get_process_group_ranks(group)) for group in self.groups))
        if shared != {torch.distributed.get_rank()}:
            raise ValueError(
                "group: those that share a batch must each hold another copy of the SAE, and processes "
                f"{sorted(shared)} share its latents too"
            )

    @property
    def groups(self) -> list[ProcessGroup]:
        return [group for group in (self.shard, self.data) if group is not None]

    @property
    def part(self) -> tuple[int, int]:
        """(which part of the batch is this process's, of how many)."""
        if self.data is None:
            return 0, 1
        return torch.distributed.get_rank(self.data), torch.distributed.get_world_size(self.data)

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes and shows."""
        return all(torch.distributed.get_rank(group) == 0 for group in self.groups)

    @property
    def first_copy(self) -> bool:
        """Whether this process belongs to the first of the groups that hold the same weights."""
        return self.part[0] == 0

    def barrier(self) -> None:
        for group in self.groups:
            torch.distributed.barrier(group)

    def shared(self, value: T) -> T:
        """The main process's value, on all."""
        for group in self.groups:
            holder = [value]
            torch.distributed.broadcast_object_list(holder, group=group, group_src=0)
            value = holder[0]
        return value

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so on any process."""
        count = torch.tensor([int(flag)], device=device)
        for group in self.groups:
            count = summed(count, group)
        return bool(count)


def clip_gradients(sae: nn.Module, limit: float, ranks: Ranks) -> Tensor:
    """Scales the gradients down to a norm of at most `limit`, that of the whole SAE; returns the norm before."""
    parameters = dict(sae.named_parameters())
    if ranks.shard is None:
        return nn.utils.clip_grad_norm_(parameters.values(), limit)
    squares = {
        name: torch.linalg.vector_norm(p.grad, dtype=torch.float64).square()
        for name, p in parameters.items()
        if p.grad is not None
    }
    nothing = torch.zeros((), dtype=torch.float64, device=sae.W_dec.device)
    mine = sum((square for name, square in squares.items() if name in sae.sharded), nothing)
    rest = sum(square for name, square in squares.items() if name not in sae.sharded)
    norm = (summed(mine, ranks.shard) + rest).sqrt()
    nn.utils.clip_grads_with_norm_(parameters.values(), limit, norm)
    return norm
