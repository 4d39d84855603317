"""Shards from batches: the model computes, one batch is on its way to the host, finished shards are being written."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..._seed import mix_seed
from ..store.shards import Parts
from ..store.writer import shuffled
from .inputs import Inputs
from .recipe import Recipe, Recorded

NAN = ("raise", "drop", "keep")
OnBatch = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """Which batches make which shard: batches of the inputs (None: unknown), batches_per_shard, and shuffle: a seed
    that draws the order of the batches (where their number is known) and that of the rows within a shard. The ids of
    the inputs count from first_id."""

    batches: int | None
    batches_per_shard: int
    shuffle: int | None = None
    first_id: int = 0

    @property
    def shards(self) -> int | None:
        return None if self.batches is None else -(-self.batches // self.batches_per_shard)

    def steps(self, shards: Iterable[int]) -> Iterator[tuple[int, int, bool]]:
        """(shard, batch, whether it is the shard's last) for the given shards."""
        order = self._order()
        for shard in shards:
            end = (shard + 1) * self.batches_per_shard
            end = end if self.batches is None else min(end, self.batches)
            for place in range(shard * self.batches_per_shard, end):
                yield shard, place if order is None else int(order[place]), place == end - 1

    def missing(self, done: Iterable[int]) -> Iterable[int]:
        """The shards that are still to be made; without end where the inputs' number is unknown."""
        done = set(done)
        every = itertools.count() if self.shards is None else range(self.shards)
        return (shard for shard in every if shard not in done)

    def _order(self) -> Tensor | None:
        if self.shuffle is None or self.batches is None:
            return None
        return torch.randperm(self.batches, generator=torch.Generator().manual_seed(mix_seed(self.shuffle, -1)))


def recorded(recipe: Recipe, inputs: Inputs, numbers: Iterable[int]) -> Iterator[Recorded]:
    """What the model gives for the batches of these numbers, on the host.

    On CUDA one batch behind: its copy to pinned memory runs on a stream of its own beside the next batch's forward.
    """
    copying: tuple[Recorded, torch.cuda.Event] | None = None
    stream = torch.cuda.Stream(recipe.device) if recipe.device.type == "cuda" else None
    for batch in inputs.read(numbers):
        rows = recipe.rows(batch)
        if stream is None:
            yield _map(rows, lambda t: t.cpu())
            continue
        started = _start_copy(rows, stream)
        if copying is not None:
            copying[1].synchronize()
            yield copying[0]
        copying = started
    if copying is not None:
        copying[1].synchronize()
        yield copying[0]


def run_shards(
    recipe: Recipe,
    inputs: Inputs,
    plan: Plan,
    shards: Iterable[int],
    write: Callable[[int, Parts, int], Any],
    *,
    nan: str = "raise",
    writers: int = 1,
    on_batch: OnBatch | None = None,
) -> None:
    """Makes the given shards; write(number, parts, dropped) runs in `writers` threads, at most that many shards
    ahead of the disk. An error in a thread ends the run, after the shards under way are written."""
    ours, theirs = itertools.tee(shards)
    batches = (batch for _, batch, _ in plan.steps(theirs))
    parts: list[dict[str, Tensor]] = []
    shard = None

    def finish(number: int, rows: Parts) -> None:
        write(number, *settled(rows, nan, plan.shuffle, number))

    with ThreadPoolExecutor(writers, thread_name_prefix="shard") as pool:
        pending: set[Future] = set()
        for (shard, _, last), rows in zip(plan.steps(ours), recorded(recipe, inputs, batches), strict=False):
            parts.append(rows.finished())
            parts[-1]["row"] += plan.first_id
            if on_batch is not None:
                on_batch(len(rows.place), sum(t.nbytes for t in parts[-1].values()))
            if last:
                pending = _room(pending, writers)
                pending.add(pool.submit(finish, shard, parts))
                parts = []
        if parts:
            pending.add(pool.submit(finish, shard, parts))
        while pending:
            pending = _room(pending, 1)


def settled(parts: Parts, nan: str, shuffle: int | None, shard: int) -> tuple[Parts, int]:
    """A shard's rows, shuffled where asked for, and how many were dropped for NaN or Inf.

    nan: "raise" (FloatingPointError naming the first such row), "drop" or "keep".
    """
    dropped = 0
    for i, part in enumerate(parts if nan != "keep" else ()):
        main = part["x"] if "x" in part else part["values"]
        # a finite sum has no NaN and no Inf in it: the row by row search is for the others
        if torch.isfinite(main.sum(dtype=torch.promote_types(main.dtype, torch.float32))):
            continue
        bad = ~main.isfinite().all(1)
        if bad.any() and nan == "raise":
            first = int(bad.nonzero()[0])
            where = f"input {int(part['row'][first])}"
            where += f", position {int(part['position'][first])}" if "position" in part else ""
            raise FloatingPointError(
                f"extract: shard {shard} has NaN or Inf in {int(bad.sum())} rows of a batch, the first is of {where}; "
                "nan='drop' leaves them out and counts them, nan='keep' keeps them"
            )
        dropped += int(bad.sum())
        parts[i] = {name: t[~bad] for name, t in part.items()}
    return shuffled(parts, shuffle, shard), dropped


def _room(pending: set[Future], limit: int) -> set[Future]:
    """Waits until fewer than `limit` writes are pending; raises the first error among those that ended."""
    while len(pending) >= limit:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
    return pending


def _map(rows: Recorded, move: Callable[[Tensor], Tensor]) -> Recorded:
    return replace(rows, tensors={name: move(t) for name, t in rows.tensors.items()}, place=move(rows.place))


def _start_copy(rows: Recorded, stream: torch.cuda.Stream) -> tuple[Recorded, torch.cuda.Event]:
    def copy(t: Tensor) -> Tensor:
        if t.device.type != "cuda":
            return t
        t.record_stream(stream)
        return torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)

    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        return _map(rows, copy), stream.record_event()
