"""Extraction beside the bare forward pass, its memory and the size of its files."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from sae_kernels.data.extract import CallableInputs, extract
from sae_kernels.data.store import ActivationStore
from sae_kernels.recommenders import SASRec

from .figures import at_most, in_turn, peak_mb, ratio, say, timed

LENGTH, D = 200, 64
MEAN_LENGTH = (1 + LENGTH) / 2


def synthetic(users: int) -> CallableInputs:
    """A log made as it is asked for: users with 1 to 200 items of 50,000, padded on the left."""

    def make(start: int, stop: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(start)
        x = torch.randint(1, 50_001, (stop - start, LENGTH), generator=generator)
        x[torch.arange(LENGTH) < torch.randint(0, LENGTH, (stop - start, 1), generator=generator)] = 0
        return x

    return CallableInputs(make, users, 256, "synthetic log")


def model_of_log() -> SASRec:
    torch.manual_seed(0)
    return SASRec(50_000, D, max_len=LENGTH).eval()


def not_padding(x: torch.Tensor) -> torch.Tensor:
    return x != 0


def forward(module: Callable, inputs: CallableInputs, batches: range) -> None:
    with torch.no_grad():
        for batch in inputs.read(batches):
            module(batch.value)


def extraction(model: SASRec, inputs: CallableInputs, store: Path, **options: object) -> ActivationStore:
    shutil.rmtree(store, ignore_errors=True)
    return extract(model, "norm", inputs, store, mask=not_padding, **{"progress": False, **options})


def ml1m(shared: Path, folder: Path, rounds: int) -> None:
    import numpy

    from sae_kernels.data import load

    model = SASRec.from_state(numpy.load(shared / "models" / "sasrec_ml1m_pmixer_e860.npz"))
    histories = load(shared / "ml1m").histories()
    inputs = CallableInputs(lambda a, b: histories.padded(torch.arange(a, b), LENGTH), len(histories), 256)
    every = range(inputs.batches)
    works = (
        lambda: forward(model, inputs, every),
        lambda: forward(model.encode, inputs, every),
        lambda: extraction(model, inputs, folder / "s"),
    )
    for work in works:
        work()
    whole, encode, ours = in_turn(works, rounds)
    for name, which in (("wall", 0), ("CPU", 1)):
        median, spread = ratio(ours, whole, which)
        at_most(f"ml1m: extraction / forward, {name} time", median, 1.10, spread)
        median, spread = ratio(ours, encode, which)
        say(f"  over the pass as far as the module, {name} time", f"{median:.3f} {spread}")
    files(folder / "s", "ml1m")


def files(path: Path, name: str) -> None:
    store = ActivationStore.open(path)
    payload = store.rows * store.manifest.row_bytes
    on_disk = sum(file.stat().st_size for file in path.iterdir())
    at_most(f"{name}: files / payload of {store.rows:,} rows", on_disk / payload, 1.01)


def log(positions: float, folder: Path) -> None:
    """One extraction of the whole log between two halves of its bare forward pass."""
    users = round(positions / MEAN_LENGTH)
    model, inputs = model_of_log(), synthetic(users)
    say(f"log: about {positions:,.0f} positions of {users:,} users", f"{positions * (4 * D + 12) / 1e9:.2f} GB to come")
    half = inputs.batches // 2
    forward(model, inputs, range(min(4, half)))
    before = timed(lambda: forward(model, inputs, range(half)))
    ours = alone(users, folder / "s")
    after = timed(lambda: forward(model, inputs, range(half, inputs.batches)))
    for name, i in (("wall", 0), ("CPU", 1)):
        bare = before[i] + after[i]
        note = f"({ours['seconds'][i]:.0f} s over {bare:.0f} s)"
        at_most(f"log: extraction / forward, {name} time", ours["seconds"][i] / bare, 1.10, note)
    files(folder / "s", "log")
    tenth = alone(users // 10, folder / "tenth")
    note = f"({ours['peak']:,.0f} MB, {tenth['peak']:,.0f} MB for {tenth['rows']:,})"
    at_most(f"log: peak memory of {ours['rows']:,} rows / of a tenth", ours["peak"] / tenth["peak"], 1.05, note)
    for name in ("s", "tenth"):
        shutil.rmtree(folder / name)


def memory(largest: int, folder: Path) -> None:
    """Peak memory of fresh processes: the rows double, and double again."""
    peaks = []
    for positions in (largest // 4, largest // 2, largest):
        found = alone(round(positions / MEAN_LENGTH), folder / "s", shard_mb=16)
        peaks.append(found["peak"])
        say(f"memory: peak with {found['rows']:,} rows, shards of 16 MB", f"{found['peak']:,.0f} MB")
    at_most("memory: four times the rows take", peaks[-1] / peaks[0], 1.05, "times as much")
    shutil.rmtree(folder / "s")


def alone(users: int, store: Path, **options: object) -> dict:
    """Rows, peak MB, wall and CPU seconds of an extraction in a process of its own."""
    facts = json.dumps([users, str(store), torch.get_num_threads(), options])
    command = [sys.executable, "-m", "benchmarks.extraction.forward", facts]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main(users: int, store: str, threads: int, options: dict) -> None:
    torch.set_num_threads(threads)
    model, inputs = model_of_log(), synthetic(users)
    with tempfile.TemporaryDirectory(dir=Path(store).parent) as place:  # imports, first use of threads
        extraction(model, synthetic(512), Path(place) / "s")
    seconds = timed(lambda: extraction(model, inputs, Path(store), **options))
    print(json.dumps({"rows": ActivationStore.open(store).rows, "peak": peak_mb(), "seconds": seconds}))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
