"""Activations straight into training, through a bounded queue and without a disk; and what the latents do on them."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..._seed import mix_seed
from ...nn import TopKSAE
from ...ops import ActivationStats
from .inputs import as_inputs
from .pipeline import recorded
from .recipe import Recipe


class ActivationStream:
    """Batches [batch_rows, d] of what `module` of `model` puts out, made by a thread that is at most `ahead` input
    batches ahead. A source for `fit`; a context manager, or close() it.

        with ActivationStream(model, "encoder", x, batch_rows=1024) as stream:
            fit(sae, stream, steps=5000)

    model, module, inputs, batch_size and options (prepare, mask, positions, output_index, output_key, dtype, autocast,
    device): as in `extract`. Each epoch draws every row once, its last batch may be shorter; epochs follow one another
    without end, `epochs` of them if given. shuffle: a seed; rows are shuffled within a buffer of buffer_rows rows, and
    the order of the input batches anew in each epoch where they can be sought.

    Its position is kept by state_dict: the epoch and the batches given in it. A resumed one runs the model over that
    epoch's inputs from its beginning, and drops what was given already.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        module: str,
        inputs: Any,
        *,
        batch_size: int = 256,
        columns: list[str] | None = None,
        batch_rows: int = 1024,
        buffer_rows: int = 65536,
        shuffle: int | None = None,
        epochs: int | None = None,
        ahead: int = 4,
        **options: Any,
    ) -> None:
        for name, value in (("batch_rows", batch_rows), ("buffer_rows", buffer_rows), ("ahead", ahead)):
            if value < 1:
                raise ValueError(f"ActivationStream: {name} must be at least 1, got {value}")
        self._recipe = Recipe(model, module, **options)
        self._inputs = as_inputs(inputs, batch_size, columns)
        self._batch_rows, self._buffer_rows = batch_rows, max(buffer_rows, batch_rows)
        self._shuffle, self._epochs, self._ahead = shuffle, epochs, ahead
        self._epoch, self._given = 0, 0
        self._batches: Iterator[Tensor] | None = None
        self._producer: _Producer | None = None

    def next(self) -> Tensor:
        """The next batch; StopIteration after the last epoch."""
        while self._epochs is None or self._epoch < self._epochs:
            if self._batches is None:
                self._batches = self._epoch_batches(self._epoch)
                for _ in range(self._given):
                    next(self._batches)
            batch = next(self._batches, None)
            if batch is not None:
                self._given += 1
                return batch
            if not self._given:
                raise ValueError("ActivationStream: the inputs gave no row at all: is the mask right?")
            self._epoch, self._given, self._batches = self._epoch + 1, 0, None
        raise StopIteration

    __next__ = next

    def __iter__(self) -> "ActivationStream":
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self._epoch, self._given = state["epoch"], state["given"]

    def describe(self) -> str:
        inputs = ", ".join(f"{name} {value}" for name, value in self._inputs.describe().items())
        return (
            f"stream {type(self._recipe.model).__name__} at {self._recipe.module}, batches of {self._batch_rows}, "
            f"buffers of {self._buffer_rows}, shuffle {self._shuffle}, {inputs}"
        )

    def close(self) -> None:
        """Ends the thread; the next batch would start it anew."""
        self._batches = None
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    def __enter__(self) -> "ActivationStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _epoch_batches(self, epoch: int) -> Iterator[Tensor]:
        if self._producer is not None:
            self._producer.close()
        self._producer = _Producer(self._recipe, self._inputs, self._order(epoch), self._ahead)
        held, rows, fills = [], 0, 0
        for x in self._producer:
            held.append(x)
            rows += len(x)
            if rows >= self._buffer_rows:
                buffer = self._mixed(held, epoch, fills)
                fills += 1
                # what is left of a batch waits for the next buffer
                whole = rows - rows % self._batch_rows
                yield from buffer[:whole].split(self._batch_rows)
                held, rows = [buffer[whole:]], rows - whole
        if rows:
            yield from self._mixed(held, epoch, fills).split(self._batch_rows)

    def _mixed(self, held: list[Tensor], epoch: int, fills: int) -> Tensor:
        buffer = torch.cat(held)
        if self._shuffle is None:
            return buffer
        generator = torch.Generator().manual_seed(mix_seed(mix_seed(self._shuffle, epoch), fills))
        return buffer[torch.randperm(len(buffer), generator=generator)]

    def _order(self, epoch: int) -> Iterator[int]:
        batches = self._inputs.batches
        if self._shuffle is None or batches is None:
            return iter(range(2**62 if batches is None else batches))
        generator = torch.Generator().manual_seed(mix_seed(self._shuffle, epoch))
        return iter(torch.randperm(batches, generator=generator).tolist())


def collect_stats(stream: ActivationStream, sae: TopKSAE, **options: Any) -> ActivationStats:
    """What the latents of `sae` do on all that the stream still gives; it must end (epochs=1). options: those of
    ActivationStats. Nothing is kept of the activations."""
    if stream._epochs is None:
        raise ValueError("collect_stats: the stream has no end; give it epochs=1")
    stats = ActivationStats(sae.d_sae, device=sae.W_enc.device, **options)
    with torch.no_grad():
        for x in stream:
            code = sae.encode(x.to(sae.W_enc.device, torch.promote_types(x.dtype, sae.W_enc.dtype)))
            stats.update(code.values, code.indices)
    return stats


class _Producer:
    """A thread that fills a queue of at most `ahead` batches; its error is raised where the queue is read."""

    def __init__(self, recipe: Recipe, inputs: Any, numbers: Iterator[int], ahead: int) -> None:
        self._queue: queue.Queue[Tensor | BaseException | None] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(recipe, inputs, numbers), daemon=True)
        self._thread.start()

    def _fill(self, recipe: Recipe, inputs: Any, numbers: Iterator[int]) -> None:
        try:
            with recipe:
                first = None if recipe.first else next(iter(inputs.read([0])), None)
                if first is not None:  # through the whole model once: a module that runs twice is refused
                    recipe.probe(first)
                for rows in recorded(recipe, inputs, numbers):
                    if not self._put(rows.tensors["x"]):
                        return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Tensor | BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Tensor]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        self._closed.set()
        while self._thread.is_alive():
            self._thread.join(0.05)
