"""Writing and reading a store beside plain sequential writes and reads of as many bytes."""

import itertools
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from sae_kernels._sync import sync
from sae_kernels.data.extract import CallableInputs, extract
from sae_kernels.data.reader import ShuffledReader
from sae_kernels.data.store import ActivationStore, RowWriter
from sae_kernels.data.store.moments import Moments
from sae_kernels.data.store.shards import digest

from .figures import at_least, in_turn, middle, ratio, say, timed

MIB = 1 << 20


def write(folder: Path, megabytes: int, rounds: int) -> None:
    """extract() of a model that does nothing, against write() of the same bytes; both synced to the disk."""
    x = torch.randn(megabytes * 1_000_000 // 4096, 1024)
    inputs = CallableInputs(lambda start, stop: x[start:stop], len(x), 4096, "rows at hand")
    model = nn.Sequential(nn.Identity())

    def store(writers: int) -> None:
        extract(model, "0", inputs, folder / "s", writers=writers, progress=False)

    def clean() -> None:
        shutil.rmtree(folder / "s", ignore_errors=True)
        (folder / "plain").unlink(missing_ok=True)
        os.sync()

    works = (lambda: _plain(folder / "plain", x), lambda: store(1), lambda: store(2))
    in_turn(works, 1, clean)  # first use of the memory
    plain, *ours = in_turn(works, rounds, clean)
    say("write: plain sequential, write and fsync", f"{x.nbytes / middle(plain) / 1e6:,.0f} MB/s")
    for writers, taken in enumerate(ours, 1):
        median, spread = ratio(plain, taken)
        at_least(f"write: store / plain rate, writers={writers}", median, 0.80, spread)
        say("", f"{x.nbytes / middle(taken) / 1e6:,.0f} MB/s, {middle(taken, 1) / x.nbytes * 1e9:.2f} CPU s per GB")
    clean()
    _shares(folder / "plain", x)
    clean()


def _plain(path: Path, x: torch.Tensor, sync: bool = True) -> None:
    data = memoryview(x.view(-1).view(torch.uint8).numpy())
    with open(path, "wb", buffering=0) as file:
        while data:
            data = data[file.write(data[: 16 * MIB]) :]
        if sync:
            os.fsync(file.fileno())


def _shares(path: Path, x: torch.Tensor) -> None:
    """What the work on a shard consists of, each part alone."""
    data = [memoryview(x.view(-1).view(torch.uint8).numpy())]
    parts = {
        "copies of batches": lambda: [part.clone() for part in x.split(4096)],
        "sha256": lambda: digest(data),
        "mean and variance": lambda: Moments.of(x),
        "write": lambda: _plain(path, x, sync=False),
        "fsync": lambda: sync(path),
    }
    taken = ", ".join(f"{name} {timed(work)[0] / x.nbytes * 1e9:.2f}" for name, work in parts.items())
    say(f"  seconds per GB alone: {taken}", "")


def read(folder: Path, megabytes: int, rounds: int) -> None:
    """An epoch of ShuffledReader against read() of the shards into as much memory as the reader's buffer."""
    for width in (64, 512):
        path = folder / f"rows{width}"
        with RowWriter(path, width, shard_rows=64 * MIB // (4 * width)) as writer:
            for block in range(megabytes // 32):
                writer.add(torch.full((32_000_000 // (4 * width), width), float(block)))
        store = ActivationStore.open(path)
        for buffer in (8, 128):
            for workers in (0, 1):
                _read(store, buffer, workers, rounds, cold=False)
        for workers in (0, 1):
            _read(store, 128, workers, max(3, rounds // 3), cold=True)
        shutil.rmtree(path)


def _read(store: ActivationStore, buffer: int, workers: int, rounds: int, cold: bool) -> None:
    row = store.d * store.dtype.itemsize
    batch = min(4096, MIB // row)
    names = [Path(store.url) / shard.name for shard in store.shards]
    memory, reader = memoryview(bytearray()), None

    def fresh() -> None:
        """Both begin anew: no file in memory, no memory used before."""
        nonlocal memory, reader
        if reader is not None:
            reader.close()
        memory = memoryview(bytearray(buffer * MIB))
        opened = ActivationStore.open(store.url)
        reader = ShuffledReader(opened, batch, buffer_rows=buffer * MIB // row, workers=workers)
        if cold:
            _forget(names)

    def epoch() -> None:
        for _ in range(store.rows // batch):
            reader.next()

    works = (lambda: _raw(names, memory), epoch)
    fresh()
    if not cold:
        in_turn(works, 2)  # first use of the memory, and all in the page cache
    raw, ours = in_turn(works, rounds, fresh if cold else int)
    reader.close()
    where = f"{'disk' if cold else 'page cache'}, buffer {buffer} MiB"
    threads = f"{workers} worker" if workers else "one thread"
    median, spread = ratio(raw, ours)
    at_least(f"read: {row} B rows, {where}, {threads}: rate / raw", median, 0.80, spread)
    size = store.rows * row / 1e6
    say("", f"raw {size / middle(raw):,.0f} MB/s, reader {size / middle(ours):,.0f} MB/s")


def _raw(names: list[Path], memory: memoryview) -> None:
    places = itertools.cycle([memory[start : start + MIB] for start in range(0, len(memory), MIB)])
    for name in names:
        with open(name, "rb", buffering=0) as file:
            while file.readinto(next(places)):
                pass


def _forget(names: list[Path]) -> None:
    """Drops the files from the page cache."""
    for name in names:
        file = os.open(name, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
