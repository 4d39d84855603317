"""python -m benchmarks.extraction [--shared ../shared/data]: what extraction costs beside the model it runs.

CPU time of extract() and of the bare forward pass, interleaved, one thread; peak memory at two sizes; bytes of the
store against its rows; write rate against a plain sequential write of the same bytes, both synced to the disk.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from sae_kernels.data.extract import CallableInputs, extract
from sae_kernels.data.store import ActivationStore
from sae_kernels.recommenders import SASRec

LENGTH, D = 200, 64


def synthetic(users: int, batch_size: int = 256) -> CallableInputs:
    """A log made as it is asked for: users with 1 to 200 items of 50,000, padded on the left."""

    def make(start: int, stop: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(start)
        x = torch.randint(1, 50_001, (stop - start, LENGTH), generator=generator)
        x[torch.arange(LENGTH) < torch.randint(0, LENGTH, (stop - start, 1), generator=generator)] = 0
        return x

    return CallableInputs(make, users, batch_size, "synthetic log")


def model_of_log() -> SASRec:
    torch.manual_seed(0)
    return SASRec(50_000, D, max_len=LENGTH).eval()


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def not_padding(x: torch.Tensor) -> torch.Tensor:
    return x != 0


def overhead(name: str, model: SASRec, inputs: CallableInputs, folder: Path, rounds: int) -> None:
    def forward(module: Callable) -> None:
        with torch.no_grad():
            for batch in inputs.read(range(inputs.batches)):
                module(batch.value)

    def extraction() -> None:
        extract(model, "norm", inputs, folder / "s", mask=not_padding, progress=False)

    rows = []
    for _ in range(rounds):
        shutil.rmtree(folder / "s", ignore_errors=True)
        rows.append([cpu_seconds(work) for work in (lambda: forward(model), lambda: forward(model.encode), extraction)])
    # other processes can only add to a CPU time
    whole, encode, ours = (min(column) for column in zip(*rows, strict=True))
    store = ActivationStore.open(folder / "s")
    payload = store.rows * store.manifest.row_bytes
    on_disk = sum(path.stat().st_size for path in (folder / "s").iterdir())
    print(
        f"{name}: {store.rows:,} rows; CPU s of forward {whole:.2f}, of its part up to the module {encode:.2f}, of "
        f"extract {ours:.2f}: {ours / whole:.3f} and {ours / encode:.3f} times, the least of {rounds} rounds each; "
        f"files / rows {on_disk / payload:.5f}"
    )


def peak_memory(users: int) -> float:
    """MB of a fresh process that extracts the synthetic log."""
    code = f"from benchmarks.extraction import alone; alone({users})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def alone(users: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        options = dict(mask=not_padding, progress=False, shard_mb=16)
        extract(model_of_log(), "norm", synthetic(users), Path(folder) / "s", **options)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def write_rate(folder: Path, megabytes: int, rounds: int) -> None:
    """A model that does nothing, against write() and fsync() of the same bytes."""
    x = torch.randn(megabytes * 1_000_000 // 4096, 1024)
    inputs = CallableInputs(lambda start, stop: x[start:stop], len(x), 4096, "rows at hand")
    model, ratios, rates = nn.Sequential(nn.Identity()), [], []

    def plain() -> None:
        data = memoryview(x.view(-1).view(torch.uint8).numpy())
        with open(folder / "plain", "wb", buffering=0) as file:
            while data:
                data = data[file.write(data[: 1 << 24]) :]
            os.fsync(file.fileno())

    def store() -> None:
        extract(model, "0", inputs, folder / "s", writers=2, shard_mb=32, progress=False)

    for _ in range(rounds):
        seconds = []
        for work in (plain, store):
            shutil.rmtree(folder / "s", ignore_errors=True)
            (folder / "plain").unlink(missing_ok=True)
            os.sync()
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
        rates.append([x.nbytes / s / 1e6 for s in seconds])
    plain_rate, ours = (statistics.median(column) for column in zip(*rates, strict=True))
    print(
        f"write: plain {plain_rate:,.0f} MB/s, store {ours:,.0f} MB/s, {statistics.median(ratios):.2f} of it "
        f"(median of {rounds} pairs, {min(ratios):.2f} to {max(ratios):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    parser.add_argument("--users", type=int, default=20_000, help="of the synthetic log: 100 positions each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as place:
        folder = Path(place)
        if (options.shared / "ml1m").is_dir():
            import numpy

            from sae_kernels.data import load

            model = SASRec.from_state(numpy.load(options.shared / "models" / "sasrec_ml1m_pmixer_e860.npz"))
            histories = load(options.shared / "ml1m").histories()
            inputs = CallableInputs(lambda a, b: histories.padded(torch.arange(a, b), LENGTH), len(histories), 256)
            overhead("SASRec on ml1m", model, inputs, folder, options.rounds)
        overhead("SASRec on a synthetic log", model_of_log(), synthetic(options.users), folder, options.rounds)
        write_rate(folder, options.megabytes, options.rounds)
    sizes = (options.users // 8, options.users // 2)
    peaks = [peak_memory(users) for users in sizes]
    print(f"peak memory: {peaks[0]:,.0f} MB for {sizes[0]:,} users, {peaks[1]:,.0f} MB for {sizes[1]:,}")


if __name__ == "__main__":
    main()
