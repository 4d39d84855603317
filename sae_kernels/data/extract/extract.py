"""extract: a model's activations into a store that a crash cannot spoil."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ...nn import TopKSAE
from ..engines import local, torchrun
from ..store import ActivationStore
from ..store.shards import Parts
from ..store.writer import place_of, read_manifest
from .inputs import as_inputs
from .job import Job, Progress
from .pipeline import NAN
from .recipe import Recipe

ENGINES = ("local", "torchrun", "ray")


def extract(
    model: nn.Module | Callable[[], nn.Module],
    module: str,
    inputs: Any,
    store: str | os.PathLike,
    *,
    batch_size: int = 256,
    columns: list[str] | None = None,
    prepare: Callable[[Any], Any] | None = None,
    mask: Any = None,
    positions: str = "all",
    output_index: int | None = None,
    output_key: str | None = None,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    device: torch.device | str | None = None,
    sae: TopKSAE | None = None,
    nan: str = "raise",
    shuffle: int | None = None,
    first_id: int = 0,
    shard_mb: float = 64,
    writers: int = 1,
    append: bool = False,
    engine: str = "local",
    workers: int = 1,
    storage_options: dict[str, Any] | None = None,
    progress: bool = True,
) -> ActivationStore:
    """Runs the model over all inputs and stores what `module` puts out: [rows, d] with the id of each row's input.

        extract(model, "encoder", x, "acts")                               # x [inputs, ...]
        extract(model, "norm", loader, "s3://bucket/acts", mask=lambda seq: seq != 0, dtype=torch.bfloat16)

    Killed at any moment and called again with the same arguments, it goes on, and the store ends up the same, row for
    row; where it is finished already it is opened. Anything else that stands at `store` is left alone: ValueError where
    it comes from another model, module, dtype or other inputs (append=True adds those). Tensors are told from others by
    all that they hold; a Dataset, DataLoader or iterable by its type, its size where it has one, and its first batch.

    model: a module, or a function that makes it (then each worker makes its own). inputs, batch_size, columns: see
    `as_inputs`. prepare: a batch -> what the model takes (a tensor, a tuple of arguments or a dict). module, mask,
    positions, output_index, output_key: as in `record`; an output [B, T, d] gives rows with their position, without
    those that the mask drops. The module must run once in a forward pass, which ends there.
    dtype: of what is stored, as it comes where None. autocast: run the model in this dtype. sae: store its codes (k
    values and k indices) in the place of the activations; the SAE is applied on the fly.
    nan: rows with NaN or Inf: "raise", "drop" (counted in each shard's `dropped`) or "keep". shuffle: a seed; batches
    go to shards in random order, and rows are shuffled within their shard. first_id: what the inputs' ids count from.
    shard_mb: size of a shard, at most; batches that are wider than the first one, and than text_inputs' max_tokens or
    CallableInputs' widest, make larger ones. Memory: about four shards and a batch, whatever the number of rows;
    `writers` threads write (each one more holds two shards more).
    engine: "local"; "torchrun": each of its processes makes its share; "ray": `workers` actors of Ray Data, each with a
    GPU where device is "cuda"; the shards of a lost one are made anew by another. progress: says the size before
    writing and shows a bar.

    Raises ValueError, TypeError, OSError (too little disk, before or while writing), ConnectionError (bucket) and
    FloatingPointError (nan="raise") naming what is wrong; no partial shard ever counts.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    job = _job(locals())
    shown = Progress(job, progress and int(os.environ.get("RANK", 0)) == 0)
    try:
        if engine == "ray":
            from ..engines import ray

            return ray.run(job, shown, workers, gpus=float(str(device).startswith("cuda")))
        return {"local": local, "torchrun": torchrun}[engine].run(job, shown)
    finally:
        shown.close()


def repair(
    model: nn.Module | Callable[[], nn.Module], module: str, inputs: Any, store: str | os.PathLike, **options: Any
) -> list[int]:
    """Makes the damaged shards of a store anew, and no others; returns their numbers. Arguments: those of `extract`.

    ValueError where the store was not made by this extraction, or where a shard comes out different.
    """
    job = _job({**_DEFAULTS, **options, "model": model, "module": module, "inputs": inputs, "store": store})
    opened = ActivationStore.open(job.store, job.storage_options)
    damaged = [damage.shard for damage in opened.verify()]
    if not damaged:
        return []
    recipe = job.make_recipe()
    facts = job.probe(recipe)
    writer = job.writer(facts)
    ours = place_of(writer.manifest, writer.plan) or range(0)
    away = [number for number in damaged if number not in ours]
    if away:
        raise ValueError(f"{job.store}: shard {away[0]} is damaged and comes from other inputs than these")

    def write(number: int, rows: Parts, dropped: int) -> None:
        writer.replace(ours[number], rows)

    job.run(recipe, facts, [number - ours.start for number in damaged], write)
    return damaged


_DEFAULTS = dict(extract.__kwdefaults__)


def _job(given: dict[str, Any]) -> Job:
    unknown = given.keys() - _DEFAULTS.keys() - {"model", "module", "inputs", "store"}
    if unknown:
        raise TypeError(f"extract has no argument {sorted(unknown)[0]!r}")
    if given["nan"] not in NAN:
        raise ValueError(f"nan must be one of {', '.join(NAN)}, got {given['nan']!r}")
    for name, least in (("shard_mb", 0), ("writers", 1)):
        if not given[name] >= least or given[name] == 0:
            raise ValueError(f"{name} must be {'at least 1' if least else 'above 0'}, got {given[name]}")
    # an unreachable place or another schema is told before the model is made
    read_manifest(given["store"], given["storage_options"])
    passed = ("prepare", "mask", "positions", "output_index", "output_key", "dtype", "autocast", "sae")
    device = torchrun.local_device(given["device"]) if given["engine"] == "torchrun" else given["device"]
    return Job(
        partial(Recipe, given["model"], given["module"], device=device, **{name: given[name] for name in passed}),
        as_inputs(given["inputs"], given["batch_size"], given["columns"]),
        os.fspath(given["store"]),
        round(given["shard_mb"] * 1e6),
        shuffle=given["shuffle"],
        first_id=given["first_id"],
        nan=given["nan"],
        writers=given["writers"],
        append=given["append"],
        storage_options=given["storage_options"],
    )
