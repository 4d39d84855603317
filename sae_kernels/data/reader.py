"""Rows of an activation store in shuffled epochs, read in large pieces through a bounded buffer."""

import hashlib
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .._need import need
from .._seed import mix_seed
from .store import ActivationStore

PIECE_BYTES, BUFFER_BYTES = 256 << 10, 128 << 20
OPEN_LOCAL = 4096
_ONCE = [object()]
_UNSHARED = sys.getrefcount(_ONCE[0])  # of what a list alone holds


class ShuffledReader:
    """A source of batches [batch_size, d] for `fit`: each epoch gives every row of the store once.

        fit(sae, ShuffledReader(ActivationStore.open("acts"), 4096), steps=10_000)

    An epoch cuts the shards into pieces of piece_rows rows, puts the pieces in random order, and deals that sequence
    to `lanes` equal lanes. A buffer of buffer_rows rows takes as many from each lane, shuffles them within it, and a
    batch takes from the lanes in turn: its rows come from all over the store, and those of one piece are spread over
    a buffer. `workers` threads fill the next buffer meanwhile (0: it is filled when it is needed). Memory: two buffers;
    of a store behind a URL also the shards that the lanes are in. Narrow rows go faster into a buffer that stays in the
    processor's cache (8 MiB, say), and are mixed more by a larger one.

    The order depends on the arguments, the seed and the store alone, and a position in it is the number of rows drawn:
    a run goes on exactly where it stopped, on any number of processes. With split(part, parts), part of `parts`
    processes draws rows part, part + parts, ... of the same order and reads nothing else; parts divides lanes. A batch
    that reaches the end of an epoch takes the rest from the next one.

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
        if store.rows == 0:
            raise ValueError(f"{store.url}: the store is empty")
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
        self._threads, self._workers = workers, ThreadPoolExecutor(workers, "reader") if workers else None
        self._buffers: list[Any] = []
        self._current: tuple[tuple[int, int], Tensor] | None = None
        self._ahead: tuple[tuple[int, int], Tensor, list[Future]] | None = None
        self._epoch: tuple[int, _Epoch] | None = None
        self._shards, self._keep = OrderedDict(), max(2, lanes) if remote else OPEN_LOCAL
        self._lock = threading.Lock()

    def next(self) -> Tensor:
        rows, parts, missing = self.store.rows, [], self.batch_size
        while missing:
            epoch, start = divmod(self._drawn, rows)
            number = start // self.buffer_rows
            end = min(start + missing, (number + 1) * self.buffer_rows, rows)
            first = self._first(number * self.buffer_rows)
            part = self._buffer(epoch, number)[self._first(start) - first : self._first(end) - first]
            self._drawn += end - start
            missing -= end - start
            # the rest comes from the next buffer, which may then take this one's memory
            parts.append(part.clone() if missing else part)
            del part
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def split(self, part: int, parts: int) -> None:
        if self.lanes % parts or not 0 <= part < parts:
            raise ValueError(f"part {part} of {parts}: the number of parts must divide the {self.lanes} lanes")
        self._part, self._parts, self._current, self._ahead = part, parts, None, None

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
            _, rows, fills = self._ahead if self._ahead and self._ahead[0] == key else (key, *self._start(key))
            self._ahead = None
            for fill in fills:
                fill.result()
            self._current = key, rows
            if self._workers is not None:
                after = (epoch, number + 1) if (number + 1) * self.buffer_rows < self.store.rows else (epoch + 1, 0)
                self._ahead = (after, *self._start(after))
        return self._current[1]

    def _start(self, key: tuple[int, int]) -> tuple[Tensor, list[Future]]:
        """Begins to fill a buffer: its rows, which are there once the futures are done."""
        epoch, number = key
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, _Epoch(self.store, self.piece_rows, self.lanes, mix_seed(self.seed, epoch))
        start = number * self.buffer_rows
        stop = min(start + self.buffer_rows, self.store.rows)
        memory = self._memory((self._first(stop) - self._first(start)) * self._row_bytes)
        lanes = range(self._part, self.lanes, self._parts)
        if self._workers is None:
            self._fill(self._epoch[1], lanes, start, stop, memory)
            fills = []
        else:
            shares = min(self._threads, len(lanes))
            jobs = ((self._epoch[1], lanes[i::shares], start, stop, memory) for i in range(shares))
            fills = [self._workers.submit(self._fill, *job) for job in jobs]
        return torch.from_numpy(memory).view(self.store.dtype).view(-1, self.store.d), fills

    def _memory(self, size: int) -> Any:
        """Memory of an old buffer of which no batch is in use, else new: first use of new memory costs most of all."""
        largest = self.buffer_rows * self._row_bytes
        for i in range(len(self._buffers)):
            if sys.getrefcount(self._buffers[i]) == _UNSHARED:
                return self._buffers[i][:size]
        self._buffers = [*self._buffers[-1:], self._numpy.empty(largest, dtype=self._numpy.uint8)]
        return self._buffers[-1][:size]

    def _fill(self, epoch: "_Epoch", lanes: range, start: int, stop: int, memory: Any) -> None:
        """Puts the rows that `lanes` have between `start` and `stop` of the epoch into their places."""
        rows, first = memory.view(f"V{self._row_bytes}"), self._first(start)
        for lane in lanes:
            # row i of a lane is row lane + i * lanes of the epoch: every so many rows of this part's buffer
            low, high = (-((lane - row) // self.lanes) for row in (start, stop))
            places = rows[self._first(lane + low * self.lanes) - first :: self.lanes // self._parts]
            generator = torch.Generator().manual_seed(mix_seed(epoch.seed, start * self.lanes + lane))
            order, done = torch.randperm(high - low, generator=generator).numpy(), 0
            for shard, begin, count in epoch.pieces(lane, low, high):
                places[order[done : done + count]] = self._shard(shard)[begin : begin + count]
                done += count

    def _shard(self, number: int) -> Any:
        """[rows] of a shard's bytes, one item per row."""
        with self._lock:
            found = self._shards.pop(number, None)
            if found is None:
                x = self.store.shard(number)["x"]
                found = x.view(torch.uint8).numpy().view(f"V{self._row_bytes}").reshape(-1)
            self._shards[number] = found
            while len(self._shards) > self._keep:
                self._shards.popitem(last=False)
        return found


class _Epoch:
    """The pieces of a store in the order of one epoch, dealt to lanes."""

    def __init__(self, store: ActivationStore, piece_rows: int, lanes: int, seed: int) -> None:
        rows = torch.tensor([shard.rows for shard in store.shards])
        counts = (rows + piece_rows - 1) // piece_rows
        order = torch.randperm(int(counts.sum()), generator=torch.Generator().manual_seed(seed))
        shard = torch.arange(len(rows)).repeat_interleave(counts)[order]
        begin = (order - (counts.cumsum(0) - counts)[shard]) * piece_rows
        ends = torch.minimum(begin + piece_rows, rows[shard]).sub_(begin).cumsum_(0)
        # its row in the shard for row e of the epoch: e + shift of the piece that e is in
        shift = begin - torch.nn.functional.pad(ends[:-1], (1, 0))
        self.seed, self._shard, self._shift, self._ends = seed, shard.numpy(), shift.numpy(), ends.numpy()
        # lane l has the rows l, l + lanes, ... of the epoch: so many
        each = (store.rows - torch.arange(lanes) + lanes - 1).clamp(min=0) // lanes
        self._lanes = (each.cumsum(0) - each).tolist()

    def pieces(self, lane: int, low: int, high: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first row, rows) of the rows low to high of a lane."""
        row, stop = self._lanes[lane] + low, self._lanes[lane] + high
        piece = int(self._ends.searchsorted(row, side="right"))
        while row < stop:
            end = min(stop, int(self._ends[piece]))
            yield int(self._shard[piece]), row + int(self._shift[piece]), end - row
            row, piece = end, piece + 1
