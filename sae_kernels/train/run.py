"""A training run: its members, the batches they share, and how all of it is kept and taken up again."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import (
    FORMAT,
    SHARDS,
    TENSORS,
    find_folder,
    other_options,
    put_weights,
    read_training,
    read_weights,
    replacing,
    with_prefix,
    write_config,
    write_sae,
)
from .member import Member
from .ranks import Ranks
from .recipe import Recipe
from .shards import own_rows, read_shards, write_shards
from .sources import Source


@dataclass
class Run:
    """members by name, "" where there is one alone; the fields of recipe but for lr are those of every member."""

    members: dict[str, Member]
    source: Source
    ranks: Ranks
    recipe: Recipe
    validate: Callable[[nn.Module], float] | None
    log: Callable[[dict[str, Any]], object] | None
    checkpoint: Path | None
    checkpoint_every: int | None
    step: int = 0

    @property
    def active(self) -> dict[str, Member]:
        """Those that have not stopped early."""
        return {name: member for name, member in self.members.items() if not member.stopped}

    @property
    def device(self) -> torch.device:
        return next(iter(self.members.values())).window.device

    def save(self) -> None:
        """Writes the checkpoint where one was asked for; every process of the run must call it.

        Raises FloatingPointError, and leaves the older one, where it would hold what is not finite.
        """
        if self.checkpoint is None:
            return
        for member in self.members.values():
            member.check_finite()
        training = {
            "step": self.step,
            "members": {name: member.state_dict() for name, member in self.members.items()},
            "source": self.source.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        with replacing(self.checkpoint, self.ranks, "" not in self.members) as folder:
            if self.ranks.shard is not None:
                self._save_parts(folder)
            elif self.ranks.main:
                for name, member in self.members.items():
                    write_sae(folder / name, member.sae)
                    torch.save(member.tensors(), folder / name / TENSORS)
            if self.ranks.main:
                if "" not in self.members:
                    names = {"format": FORMAT, "grid": list(self.members)}
                    (folder / "config.json").write_text(json.dumps(names, indent=2) + "\n")
                torch.save(training, folder / "training.pt")

    def _save_parts(self, folder: Path) -> None:
        if not self.ranks.first_copy:
            return
        for name, member in self.members.items():
            if self.ranks.main:
                write_config(folder / name, member.sae)
            weights = {f"model.{key}": value for key, value in member.sae.state_dict().items()}
            write_shards(folder / name / SHARDS, weights | member.tensors(), member.sae.sharded, self.ranks.shard)

    def restore(self) -> None:
        """Takes the run up from its checkpoint. Raises ValueError naming what differs from the run that wrote it."""
        folder = find_folder(self.checkpoint)
        training = read_training(folder)
        if training["members"].keys() != self.members.keys():
            raise ValueError(
                f"resume: {folder} holds {_names(training['members'])} and this run is of {_names(self.members)}"
            )
        for name, member in self.members.items():
            differing = member.recipe.differences(training["members"][name]["recipe"])
            differing += other_options(member.sae, folder / name)
            if differing:
                of = f" ({name})" if name else ""
                raise ValueError(f"resume: this run{of} is not the one in {folder}: {'; '.join(differing)}")
        for name, member in self.members.items():
            tensors = self._read(folder / name, member)
            put_weights(member.sae, with_prefix(tensors, "model."), folder / name)
            member.load_state_dict(training["members"][name], tensors)
        self.source.load_state_dict(training["source"])
        self.step = training["step"]
        torch.set_rng_state(training["rng"])
        if self.device.type == "cuda" and training["cuda_rng"] is not None:
            torch.cuda.set_rng_state(training["cuda_rng"], self.device)

    def _read(self, folder: Path, member: Member) -> dict[str, Tensor]:
        """What this process holds of the weights and of member.tensors(), whoever wrote them."""
        group = self.ranks.shard
        sharded = () if group is None else member.sae.sharded
        if (folder / SHARDS).is_dir():
            return read_shards(folder / SHARDS, sharded, group)
        tensors = {f"model.{key}": value for key, value in read_weights(folder).items()}
        tensors |= torch.load(folder / TENSORS, map_location="cpu", weights_only=True)
        return tensors if group is None else own_rows(tensors, sharded, group)


def _names(members: dict[str, Any]) -> str:
    return "one SAE" if "" in members else f"a grid of {', '.join(members)}"
