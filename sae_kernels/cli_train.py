"""sae-kernels train: one SAE or a grid of them, from a file or a store, in one process or under torchrun."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .train.ranks import Ranks

EXAMPLES = """examples:
  sae-kernels train acts.npy --out runs/sae                          [rows, d_in] float array
  sae-kernels train acts.npz --key hidden --out runs/sae --k 64      one array of several
  sae-kernels train acts.safetensors --out runs/sae --resume         goes on after Ctrl-C, bit for bit
  sae-kernels train runs/acts --out runs/sae                         a store of sae-kernels extract, or its URL
  sae-kernels train acts.npy --out runs/grid --grid k=16,32 width=4,8 lr=1e-3,3e-4     eight SAEs, one pass
  torchrun --nproc-per-node 4 -m sae_kernels train runs/acts --out runs/sae            each takes a part of a batch
  torchrun --nproc-per-node 4 -m sae_kernels train runs/acts --out runs/sae --shard-latents 2

The last one spreads the latents of each of two copies over two processes. --batch-size is that of all processes
together; a run goes on with --resume on another number of them, or on one. With --variant batch_topk each process
chooses over its own part of a batch, so that the result is not that of one process.
"""
VARIANTS = ("topk", "batch_topk", "jumprelu")
NORMALIZERS = ("none", "standardize", "l2", "layer_norm", "global")
GRID = {"k": int, "width": int, "lr": float}
SAMPLE = 16384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "activations", help=".npy, .npz, .safetensors or .pt with [rows, d_in] floats, or a store's folder or URL"
    )
    parser.add_argument("--key", help="which array of a file with several")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the checkpoint's folder")
    parser.add_argument("--width", type=int, default=8, help="latents per input dimension (8)")
    parser.add_argument("--k", type=int, default=32, help="active latents per row (32)")
    parser.add_argument(
        "--variant",
        choices=VARIANTS,
        default="topk",
        help="k latents in every row, on average in a batch, or by trained thresholds (topk)",
    )
    parser.add_argument(
        "--grid",
        nargs="+",
        metavar="NAME=V,V",
        help=f"train every combination of values of {', '.join(GRID)} on one pass over the rows",
    )
    parser.add_argument(
        "--normalize", choices=NORMALIZERS, default="standardize", help="input normaliser (standardize)"
    )
    parser.add_argument(
        "--refit",
        type=int,
        metavar="N",
        help="steps that fit a code's values to the input, after training (0; with --resume those of the run)",
    )
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=1024, help="rows per step, of all processes (1024)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--held-out", type=float, metavar="SHARE", help="rows of a file kept away for the final figures (0.05)"
    )
    parser.add_argument("--buffer-rows", type=int, metavar="N", help="a store's shuffle buffer (128 MiB of rows)")
    parser.add_argument("--checkpoint-every", type=int, default=1000, metavar="STEPS")
    parser.add_argument(
        "--shard-latents", type=int, default=1, metavar="N", help="processes to spread latents over (1)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda; under torchrun each its own GPU")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, weights and Adam in float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    import torch

    from .eval.reconstruction import evaluate_reconstruction
    from .train import fit

    grid = _grid(options)
    with _processes(options.device, options.shard_latents) as (ranks, device):
        source, known, sample, kind = _rows(options)
        for name, values in grid.items():
            values["refit"] = _refit(options, name)
        saes = {name: _new_sae(known, values, options, ranks) for name, values in grid.items()}
        found = fit(
            saes if options.grid else saes[""],
            source,
            steps=options.steps,
            batch_size=options.batch_size,
            lr={name: values["lr"] for name, values in grid.items()} if options.grid else options.lr,
            seed=options.seed,
            progress=not options.quiet,
            checkpoint=options.out,
            checkpoint_every=options.checkpoint_every,
            resume=options.resume,
            device=device,
            compute_dtype=torch.bfloat16 if options.bf16 else None,
            group=ranks.data,
        )
        results = found if options.grid else {"": found}
        figures = {name: evaluate_reconstruction(sae, sample) for name, sae in saes.items()}
        if ranks.main and not options.quiet:
            result = next(iter(results.values()))
            print(f"{result.steps} steps in {result.seconds:.1f} s, checkpoint in {options.out}")
            print(f"on {len(sample):,} {kind} rows:\n{_grid_table(figures) if options.grid else table(figures[''])}")
    return 0


def table(figures: dict[str, float]) -> str:
    return "\n".join(f"  {name:<12}{value:>12,.5g}" for name, value in figures.items())


def _grid_table(figures: dict[str, dict[str, float]]) -> str:
    columns = ("fvu", "cosine", "l0", "dead_share")
    wide = max(len(name) for name in figures)
    lines = [f"  {'':<{wide}}" + "".join(f"{column:>12}" for column in columns)]
    for name, row in figures.items():
        lines.append(f"  {name:<{wide}}" + "".join(f"{row[column]:>12,.5g}" for column in columns))
    return "\n".join(lines)


def _grid(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The k, width and lr of each SAE by its name; one without a name where no grid was asked for."""
    base = {name: getattr(options, name) for name in GRID}
    if not options.grid:
        return {"": base}
    axes: dict[str, list[tuple[str, Any]]] = {}
    for text in options.grid:
        name, _, values = text.partition("=")
        if name not in GRID or not values or name in axes:
            raise ValueError(f"--grid takes k=..., width=... and lr=..., each once with values, got {text!r}")
        try:
            axes[name] = [(f"{name}{value}", GRID[name](value)) for value in values.split(",")]
        except ValueError:
            raise ValueError(f"--grid: {name} takes {GRID[name].__name__}s, got {values!r}") from None
    cells = {}
    for cell in itertools.product(*axes.values()):
        label = "-".join(label for label, _ in cell)
        cells[label] = {**base, **{name: value for name, (_, value) in zip(axes, cell, strict=True)}}
    return cells


def _rows(options: argparse.Namespace) -> tuple[Any, Tensor, Tensor, str]:
    """What `fit` draws from, rows of it in random order to start from, rows to measure it on, and their name."""
    import torch

    generator = torch.Generator().manual_seed(options.seed)
    if "://" in options.activations or Path(options.activations).is_dir():
        from .data.reader import ShuffledReader
        from .data.store import ActivationStore

        for name in ("held_out", "key"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is for files; {options.activations} is a store")
        store = ActivationStore.open(options.activations)
        reader = ShuffledReader(store, options.batch_size, buffer_rows=options.buffer_rows, seed=options.seed)
        rows = torch.randint(store.rows, (min(SAMPLE, store.rows),), generator=generator)
        sample = store.read(rows).float()
        return reader, sample, sample, "training"
    from .train.activations import load_activations

    if options.buffer_rows is not None:
        raise ValueError(f"--buffer-rows is for stores; {options.activations} is a file")
    held_out = 0.05 if options.held_out is None else options.held_out
    x = load_activations(options.activations, options.key)
    if not 0 <= held_out < 1:
        raise ValueError(f"--held-out must be in [0, 1), got {held_out}")
    order = torch.randperm(len(x), generator=generator)
    kept = round(held_out * len(x))
    rows = x[order[kept:]]
    return rows, rows, x[order[:kept]] if kept else rows, "held-out" if kept else "training"


def _refit(options: argparse.Namespace, name: str) -> int:
    """--refit; without it, that of the SAE `name` of the run that goes on."""
    from .train.checkpoint import find_folder

    if options.refit is not None or not options.resume:
        return options.refit or 0
    file = find_folder(options.out) / name / "config.json"
    return json.loads(file.read_text()).get("sae", {}).get("refit", 0) if file.is_file() else 0


def _new_sae(known: Tensor, values: dict[str, Any], options: argparse.Namespace, ranks: Ranks) -> nn.Module:
    import torch

    from . import nn as modules

    if ranks.shard is not None and options.variant != "topk":
        raise ValueError(f"--shard-latents is for the variant topk, got --variant {options.variant}")
    d_in = known.shape[1]
    sizes = (d_in, values["width"] * d_in, values["k"])
    settings = {"normalize": options.normalize, "refit": values["refit"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        if ranks.shard is None:
            sae = modules.VARIANTS[options.variant](*sizes, **settings)
        else:
            sae = modules.ShardedTopKSAE(*sizes, **settings, shard_group=ranks.shard)
        if options.normalize == "global":
            sae.fit_normalizer(known)
        sae.init_b_dec(known[:SAMPLE])
    return sae


@contextmanager
def _processes(device: str, shards: int) -> Iterator[tuple[Ranks, str]]:
    """The groups of this process and its device: of torchrun's processes where there are several, else none."""
    import torch
    import torch.distributed as dist

    from .train.ranks import Ranks

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if shards < 1 or size % shards:
        raise ValueError(f"--shard-latents {shards} must divide the number of processes, {size} (torchrun starts them)")
    if size == 1:
        yield Ranks(), device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        rank = dist.get_rank()
        # every process has to take part in making every group
        shard_groups = [dist.new_group(range(i, i + shards)) for i in range(0, size, shards)]
        data_groups = [dist.new_group(range(i, size, shards)) for i in range(shards)]
        shard = shard_groups[rank // shards] if shards > 1 else None
        yield Ranks(data_groups[rank % shards] if size > shards else None, shard), device
    finally:
        dist.destroy_process_group()
