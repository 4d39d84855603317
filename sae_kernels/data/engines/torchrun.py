"""Every process that torchrun started makes its share of the shards; rank 0 commits the manifest."""

import os
from typing import Any

import torch
from torch import distributed as dist

from ..extract.job import Job, Progress
from ..store import ActivationStore


def launched() -> bool:
    """Whether torchrun (or something with its environment) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_device(device: torch.device | str | None) -> torch.device | str | None:
    """ "cuda" as the device of this process."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if str(device) == "cuda" and "LOCAL_RANK" in os.environ else device


def run(job: Job, progress: Progress) -> ActivationStore:
    """ValueError outside torchrun, and for inputs that cannot be sought. A lost process ends all of them (torchrun
    --max-restarts starts them again); what is finished stays."""
    if not launched():
        raise ValueError("engine='torchrun': start it with torchrun (RANK and WORLD_SIZE are not set)")
    if not job.inputs.seekable:
        raise ValueError(f"engine='torchrun' needs inputs that can be sought, got {type(job.inputs).__name__}")
    recipe = job.make_recipe()
    facts = job.probe(recipe)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo")
    try:
        _shares(job, progress, recipe, facts)
        return ActivationStore.open(job.store, job.storage_options)
    finally:
        if ours:
            dist.destroy_process_group()


def _shares(job: Job, progress: Progress, recipe: Any, facts: Any) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    todo: list[Any] = [None]
    if rank == 0:
        writer = job.writer(facts)
        if not writer.finished:
            done = writer.done()
            progress.begin(facts, writer, len(done))
            todo = [list(job.plan(facts).missing(done))]
    # the other ranks wait here until the store is there
    dist.broadcast_object_list(todo)
    if todo[0] is None:
        return
    writer = writer if rank == 0 else job.writer(facts)

    def shown(rows: int, size: int) -> None:
        progress(rows * world, size * world, world)  # the others do as much, nearly

    job.run(recipe, facts, todo[0][rank::world], writer.write, shown)
    dist.barrier()
    if rank == 0:
        job.finish(writer, facts)
    dist.barrier()
