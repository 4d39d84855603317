"""A grid of SAEs on one stream beside the same SAEs one by one; what `plan` predicts beside what a step takes."""

import shutil
from functools import partial
from pathlib import Path

import torch

from sae_kernels import TopKSAE
from sae_kernels.data.reader import ShuffledReader
from sae_kernels.data.store import ActivationStore, RowWriter
from sae_kernels.plan import check, measure
from sae_kernels.train import fit

from .figures import Seconds, at_most, in_turn, ratio, say

D_IN, BATCH = 128, 1024
SIZES = [(width, k) for width in (512, 1024, 2048) for k in (16, 32)]


def grid(folder: Path, steps: int, rounds: int) -> None:
    with RowWriter(folder / "acts", D_IN) as writer:
        writer.add(torch.randn(steps * BATCH, D_IN, generator=torch.Generator().manual_seed(0)))
    store = ActivationStore.open(folder / "acts")

    def train(sizes: list[tuple[int, int]]) -> None:
        saes = {f"{width}-{k}": TopKSAE(D_IN, width, k) for width, k in sizes}
        fit(saes, ShuffledReader(store, BATCH), steps=steps, progress=False)

    works = [partial(train, [size]) for size in SIZES]
    train(SIZES)
    *each, together = in_turn([*works, lambda: train(SIZES)], rounds)
    own: list[Seconds] = [tuple(map(sum, zip(*taken, strict=True))) for taken in zip(*each, strict=True)]
    median, spread = ratio(together, own)
    at_most(f"grid: {len(SIZES)} SAEs on one stream / the sum of their own runs", median, 1.30, spread)
    shutil.rmtree(folder / "acts")


def plan() -> None:
    for (rows, d_in, d_sae, k), guess, taken in check(measure()):
        size = f"{rows} rows, d_in {d_in}, d_sae {d_sae}, k {k}"
        say(f"plan: predicted / measured step, {size}", f"{guess / taken:.3f} ({taken * 1e3:.1f} ms measured)")
