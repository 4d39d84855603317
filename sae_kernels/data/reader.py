"""Rows of an activation store in shuffled epochs, read in large pieces through a bounded buffer."""

import hashlib
import math
import os
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._need import need
from .._seed import mix_seed
from . import _shard_rows
from .store import ActivationStore

PIECE_BYTES, BUFFER_BYTES = 256 << 10, 128 << 20
AHEAD_BYTES = 32 << 20  # on their way from the disk while others are copied
LINE = 64  # rows of whole cache lines are copied fastest where they begin on one
OPEN_LOCAL = 4096
Job = Callable[[], None]
Pieces = tuple[list[int], Tensor]  # the shard of each, and int64 [n, 2]: first row there, rows
_ONCE = [object()]
_UNSHARED = sys.getrefcount(_ONCE[0])  # of what a list alone holds


class ShuffledReader:
    """A source of batches [batch_size, d] for `fit`: each epoch gives every row of the store once.

        fit(sae, ShuffledReader(ActivationStore.open("acts"), 4096), steps=10_000)

    An epoch cuts the shards into pieces of piece_rows rows, puts the pieces in random order, and deals that sequence
    to `lanes` equal lanes. A buffer of buffer_rows rows takes as many from each lane, shuffles them within it, and a
    batch takes from the lanes in turn: its rows come from all over the store, and those of one piece are spread over
    a buffer. `workers` threads fill the next buffer meanwhile (0: it is filled when it is needed); next() helps them
    where it would wait. Memory: two buffers; of a store behind a URL also the shards that the lanes are in. Local files
    are read through memory maps, and the disk is asked for their pieces some way ahead.

    The order depends on the arguments, the seed and the store alone, and a position in it is the number of rows drawn:
    a run goes on exactly where it stopped, on any number of processes. With split(part, parts), part of `parts`
    processes draws rows part, part + parts, ... of the same order, and reads nothing else where parts divides lanes:
    else it reads what the lanes can be shared out for (of 32 parts and 16 lanes each reads two parts' rows, of 3 all).
    A batch that reaches the end of an epoch takes the rest from the next one.

    piece_rows: 256 KiB of rows unless told, and whole shards behind a URL; buffer_rows: 128 MiB of rows unless told.
    Raises ValueError naming the argument, or for a store of codes.
    """

    def __init__(
        self,
        store: ActivationStore,
        batch_size: int,
        *,
        buffer_rows: int | None = None,
        piece_rows: int | None = None,
        lanes: int = 16,
        workers: int = 1,
        seed: int = 0,
    ) -> None:
        if store.kind != "activations":
            raise ValueError(f"{store.url}: the reader needs a store of activations, this one holds {store.kind}")
        if store.rows == 0 or store.d == 0:
            raise ValueError(f"{store.url}: the store is empty: {store.rows} rows of {store.d} values")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("buffer_rows", buffer_rows, 1),
            ("piece_rows", piece_rows, 1),
            ("lanes", lanes, 1),
            ("workers", workers, 0),
        ):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        self._numpy = need("numpy", "the reader", "store")
        self.store, self.batch_size, self.lanes, self.seed = store, batch_size, lanes, seed
        self._row_bytes = store.d * store.dtype.itemsize
        remote = "://" in store.url
        longest = max(shard.rows for shard in store.shards)
        self.piece_rows = piece_rows or (longest if remote else max(1, PIECE_BYTES // self._row_bytes))
        # whole batches: only the last one of an epoch has to be put together from two buffers
        wanted = buffer_rows or BUFFER_BYTES // self._row_bytes
        self.buffer_rows = max(1, wanted // batch_size) * batch_size
        self._part, self._parts, self._drawn = 0, 1, 0
        self._turn, self._turns = 0, 1
        self._threads, self._workers = workers, ThreadPoolExecutor(workers, "reader") if workers else None
        self._buffers: list[Any] = []
        self._current: tuple[tuple[int, int], Tensor] | None = None
        self._ahead: tuple[tuple[int, int], _Fill] | None = None
        self._epoch: tuple[int, _Epoch] | None = None
        self._shards, self._keep = OrderedDict(), max(2, lanes) if remote else OPEN_LOCAL
        self._local = not remote
        # who may not write a file is not told what of it is in memory
        self._told = self._local and os.access(Path(store.url) / store.shards[0].name, os.W_OK)
        self._lock = threading.Lock()

    def next(self) -> Tensor:
        rows, parts, missing = self.store.rows, [], self.batch_size
        while missing:
            epoch, start = divmod(self._drawn, rows)
            number = start // self.buffer_rows
            end = min(start + missing, (number + 1) * self.buffer_rows, rows)
            first = self._first(number * self.buffer_rows)
            part = self._buffer(epoch, number)[self._first(start) - first : self._first(end) - first]
            part = part[(self._turn - self._first(start)) % self._turns :: self._turns]
            self._drawn += end - start
            missing -= end - start
            # the rest comes from the next buffer, which may then take this one's memory
            parts.append(part.clone() if missing else part)
            del part
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def split(self, part: int, parts: int) -> None:
        if not 0 <= part < parts:
            raise ValueError(f"part {part} of {parts}: parts are numbered from 0 to {parts - 1}")
        if self.batch_size < parts:
            raise ValueError(f"batch_size {self.batch_size} is too small for {parts} processes")
        # lanes are shared out as far as they go; those who read the same rows take them in turn
        self._parts = math.gcd(parts, self.lanes)
        (self._turn, self._part), self._turns = divmod(part, self._parts), parts // self._parts
        self._current, self._ahead = None, None

    def close(self) -> None:
        """Ends the threads and lets go of memory and files; what next() gave stays."""
        if self._workers is not None:
            self._workers.shutdown()
        self._current, self._ahead, self._workers = None, None, None
        self._buffers.clear()
        self._shards.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = state["drawn"]

    def describe(self) -> str:
        content = hashlib.sha256("".join(shard.sha256 for shard in self.store.shards).encode()).hexdigest()[:12]
        return (
            f"store {content}, {self.store.rows} rows, seed {self.seed}, batches of {self.batch_size}, buffers of "
            f"{self.buffer_rows}, pieces of {self.piece_rows}, {self.lanes} lanes"
        )

    def _first(self, row: int) -> int:
        """How many of the rows before `row` of an epoch are this part's."""
        return max(0, -((self._part - row) // self._parts))

    def _buffer(self, epoch: int, number: int) -> Tensor:
        key = (epoch, number)
        if self._current is None or self._current[0] != key:
            self._current = None  # its memory may hold the next one
            fill = self._ahead[1] if self._ahead and self._ahead[0] == key else self._start(key)
            self._ahead = None
            self._current = key, fill.finish().view(self.store.dtype)
            if self._workers is not None:
                after = (epoch, number + 1) if (number + 1) * self.buffer_rows < self.store.rows else (epoch + 1, 0)
                self._ahead = after, self._start(after)
        return self._current[1]

    def _start(self, key: tuple[int, int]) -> "_Fill":
        epoch, number = key
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, _Epoch(self.store, self.piece_rows, self.lanes, mix_seed(self.seed, epoch))
        start = number * self.buffer_rows
        stop = min(start + self.buffer_rows, self.store.rows)
        lanes, first = range(self._part, self.lanes, self._parts), self._first(start)
        rows = self._memory(self._first(stop) - first)
        pieces, seed = self._epoch[1].pieces(lanes, start, stop), self._epoch[1].seed
        # the disk is asked for so many lanes ahead of the one that is copied
        ahead = max(1, AHEAD_BYTES * len(lanes) // max(1, rows.nbytes))
        jobs = []
        for i, lane in enumerate(lanes):
            # row j of a lane is row lane + j * lanes of the epoch: every so many rows of this part's buffer
            places = rows[self._first(start + (lane - start) % self.lanes) - first :: self.lanes // self._parts]
            soon = pieces[i + ahead if i else 0 : i + ahead + 1] if self._local else []
            jobs.append(partial(self._fill, places, pieces[i], mix_seed(seed, start * self.lanes + lane), soon))
        return _Fill(rows, jobs, self._workers, self._threads)

    def _memory(self, rows: int) -> Tensor:
        """uint8 [rows, bytes of a row] of an old buffer of which no batch is in use, else of a new one: first use of
        new memory costs most of all."""
        for i in range(len(self._buffers)):
            if sys.getrefcount(self._buffers[i]) == _UNSHARED:
                break
        else:
            i, size = -1, self.buffer_rows * self._row_bytes + LINE
            self._buffers = [*self._buffers[-1:], self._numpy.empty(size, dtype=self._numpy.uint8)]
        begin = -self._buffers[i].ctypes.data % LINE
        memory = self._buffers[i][begin : begin + rows * self._row_bytes]
        return torch.from_numpy(memory).view(rows, self._row_bytes)

    def _fill(self, places: Tensor, pieces: Pieces, seed: int, soon: list[Pieces]) -> None:
        """Copies the pieces of a lane to its places, and asks for those that come soon."""
        for numbers, spans in soon:
            _shard_rows.ask(self._open(numbers), spans, self._told)
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
        numbers, spans = pieces
        _shard_rows.scatter(self._open(numbers), spans, order, places)

    def _open(self, numbers: list[int]) -> list[Tensor]:
        """uint8 [rows, bytes of a row] of shards."""
        with self._lock:
            return [self._shard(number) for number in numbers]

    def _shard(self, number: int) -> Tensor:
        found = self._shards.pop(number, None)
        if found is None:
            path = Path(self.store.url) / self.store.shards[number].name
            found = _shard_rows.mapped(path) if self._local else self.store.shard(number)["x"].view(torch.uint8)
        self._shards[number] = found
        while len(self._shards) > self._keep:
            self._shards.popitem(last=False)
        return found


class _Fill:
    """A buffer that is being filled: jobs, done by whichever threads have time."""

    def __init__(self, rows: Tensor, jobs: list[Job], pool: ThreadPoolExecutor | None, threads: int) -> None:
        self._rows, self._jobs = rows, deque(jobs)
        self._helpers = [pool.submit(self._work) for _ in range(min(threads, len(jobs)))] if pool else []

    def finish(self) -> Tensor:
        """The rows, once they are there: this thread does what is left."""
        self._work()
        for helper in self._helpers:
            helper.result()
        return self._rows

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.popleft()
            except IndexError:
                return
            job()


class _Epoch:
    """The pieces of a store in the order of one epoch, dealt to lanes."""

    def __init__(self, store: ActivationStore, piece_rows: int, lanes: int, seed: int) -> None:
        rows = torch.tensor([shard.rows for shard in store.shards])
        counts = (rows + piece_rows - 1) // piece_rows
        order = torch.randperm(int(counts.sum()), generator=torch.Generator().manual_seed(seed))
        shard = torch.arange(len(rows)).repeat_interleave(counts)[order]
        begin = (order - (counts.cumsum(0) - counts)[shard]) * piece_rows
        lengths = torch.minimum(begin + piece_rows, rows[shard]).sub_(begin)
        ends = lengths.cumsum(0)
        # piece p has the rows _starts[p] to _ends[p] of the epoch, which are those from _begin[p] on of its shard
        self.seed, self._shard, self._begin = seed, shard, begin
        self._starts, self._ends = ends - lengths, ends
        # lane l has the rows l, l + lanes, ... of the epoch: so many
        each = (store.rows - torch.arange(lanes) + lanes - 1).clamp(min=0) // lanes
        self._lanes = each.cumsum(0) - each

    def pieces(self, lanes: range, start: int, stop: int) -> list[Pieces]:
        """For each lane, what it has of the rows start to stop of the epoch."""
        lane = torch.arange(lanes.start, lanes.stop, lanes.step)
        every = len(self._lanes)
        low, high = (self._lanes[lane] + (row - lane + every - 1) // every for row in (start, stop))
        first = torch.searchsorted(self._ends, low, right=True)
        counts = (torch.searchsorted(self._ends, high) + 1 - first) * (low < high)
        of = torch.arange(len(lane)).repeat_interleave(counts)
        piece = torch.arange(len(of)) + (first - counts.cumsum(0) + counts)[of]
        low, high = torch.maximum(self._starts[piece], low[of]), torch.minimum(self._ends[piece], high[of])
        spans = torch.stack([self._begin[piece] + low - self._starts[piece], high - low], 1)
        counts = counts.tolist()
        shards = self._shard[piece].split(counts)
        return [(numbers.tolist(), part) for numbers, part in zip(shards, spans.split(counts), strict=True)]
