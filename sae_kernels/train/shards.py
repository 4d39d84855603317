"""Tensors of which each process has a part, in torch.distributed.checkpoint: any number of processes reads them."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def write_shards(folder: Path, tensors: dict[str, Tensor], sharded: Collection[str], group: ProcessGroup) -> None:
    """Writes tensors by dotted name; those with a part of the name in `sharded` are rows of a whole, in rank order.

    Called by every process of the group with its own part.
    """
    from torch.distributed import checkpoint

    state = {name: _whole(t, group) if _is_sharded(name, sharded) else t for name, t in tensors.items()}
    checkpoint.save(state, checkpoint_id=folder, process_group=group)


def read_shards(folder: Path, sharded: Collection[str] = (), group: ProcessGroup | None = None) -> dict[str, Tensor]:
    """The tensors in `folder`: whole without a group, else this process's rows of those named in `sharded`.

    Raises ValueError where a number of rows cannot be shared out evenly.
    """
    from torch.distributed import checkpoint

    size = 1 if group is None else torch.distributed.get_world_size(group)
    state = {}
    for name, facts in checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        shape = list(facts.size)
        here = group is not None and _is_sharded(name, sharded)
        if here and shape[0] % size:
            raise ValueError(f"{folder}: {name} has {shape[0]} rows, which {size} processes cannot share evenly")
        part = torch.empty([shape[0] // size, *shape[1:]] if here else shape, dtype=facts.properties.dtype)
        state[name] = _whole(part, group) if here else part
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # reading alone is what is meant
        checkpoint.load(state, checkpoint_id=folder, process_group=group, no_dist=group is None)
    return {name: getattr(t, "_local_tensor", t) for name, t in state.items()}


def own_rows(tensors: dict[str, Tensor], sharded: Collection[str], group: ProcessGroup) -> dict[str, Tensor]:
    """This process's rows of whole tensors."""
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    return {name: t.chunk(size)[rank] if _is_sharded(name, sharded) else t for name, t in tensors.items()}


def _is_sharded(name: str, sharded: Collection[str]) -> bool:
    # Adam counts its steps beside each sharded weight, in a number
    return not name.endswith(".step") and any(part in sharded for part in name.split("."))


def _whole(part: Tensor, group: ProcessGroup) -> Tensor:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(group, part.device.type)
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
