"""Where a training run takes its batches from: a tensor, an iterator, a callable, or a recorded model.

Every source knows its position, so that an interrupted run goes on with the very batch that came next.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._modules import evaluating
from .._seed import mix_seed


class Source(Protocol):
    """What `fit` needs: the next batch, and a position that can be kept and restored."""

    def next(self) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def describe(self) -> str: ...


def as_source(source: object, batch_size: int, seed: int) -> Source:
    """The Source behind a tensor [rows, d_in], a callable(step, generator) -> batch, or an iterable of batches.

    An object that already has next, state_dict, load_state_dict and describe is taken as it is.
    Raises TypeError for anything else.
    """
    if isinstance(source, Tensor):
        return TensorSource(source, batch_size, seed)
    if hasattr(source, "__array__"):
        raise TypeError(f"source must be a tensor, got {type(source).__name__}: torch.from_numpy makes one of an array")
    if all(callable(getattr(source, name, None)) for name in ("next", "state_dict", "load_state_dict", "describe")):
        return source
    if isinstance(source, Iterable):
        return IteratorSource(source)
    if callable(source):
        return CallableSource(source, seed)
    raise TypeError(
        "source must be a tensor [rows, d_in], an iterable of batches or a callable(step, generator), "
        f"got {type(source).__name__}"
    )


def as_batch(batch: object) -> Tensor:
    """The tensor that a source gave, also alone in a list or tuple, as a DataLoader of a TensorDataset gives it."""
    if isinstance(batch, (list, tuple)) and len(batch) == 1:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        held = f" of {len(batch)}" if isinstance(batch, (list, tuple)) else ""
        raise TypeError(f"source must give tensors [..., d_in], a batch each; it gave a {type(batch).__name__}{held}")
    return batch.detach()


def part_of(source: Source, part: int, parts: int) -> Source:
    """Rows part, part + parts, ... of every batch; a source with a method split(part, parts) does so by itself."""
    if parts == 1:
        return source
    if hasattr(source, "split"):
        source.split(part, parts)
        return source
    return _Part(source, part, parts)


class _Part:
    def __init__(self, source: Source, part: int, parts: int) -> None:
        self.source, self.part, self.parts = source, part, parts
        self.state_dict, self.load_state_dict, self.describe = (
            source.state_dict,
            source.load_state_dict,
            source.describe,
        )

    def next(self) -> Tensor:
        batch = as_batch(self.source.next())
        return batch.reshape(-1, batch.shape[-1])[self.part :: self.parts]


class TensorSource:
    """Shuffled epochs over the rows of a tensor [rows, d_in]: each epoch draws every row once.

    Batches all have min(batch_size, rows) rows; one that reaches an epoch's end takes the rest from the next epoch.
    """

    def __init__(self, x: Tensor, batch_size: int, seed: int = 0) -> None:
        if x.dim() != 2 or x.shape[0] == 0:
            raise ValueError(f"source must be a tensor [rows, d_in] with at least one row, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"source must be a floating-point tensor, got {x.dtype}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.x, self.batch_size, self.seed = x, min(batch_size, x.shape[0]), seed
        self._drawn, self._part, self._parts = 0, 0, 1
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def _rows_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(self.x.shape[0], generator=generator)
        return self._order

    def next(self) -> Tensor:
        rows, picked, missing = self.x.shape[0], [], self.batch_size
        while missing:
            epoch, start = divmod(self._drawn, rows)
            part = self._rows_of(epoch)[start : start + missing]
            picked.append(part)
            missing -= len(part)
            self._drawn += len(part)
        return self.x[torch.cat(picked)[self._part :: self._parts].to(self.x.device)]

    def split(self, part: int, parts: int) -> None:
        if self.batch_size < parts:
            raise ValueError(f"batch_size {self.batch_size} is too small for {parts} processes")
        self._part, self._parts = part, parts

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = state["drawn"]

    def describe(self) -> str:
        return f"tensor {tuple(self.x.shape)}"


class CallableSource:
    """batch = make(step, generator), the generator freshly seeded from (seed, step): its position is the step alone."""

    def __init__(self, make: Callable[[int, torch.Generator], Tensor], seed: int = 0) -> None:
        self.make, self.seed = make, seed
        self._step = 0

    def next(self) -> Tensor:
        batch = self.make(self._step, torch.Generator().manual_seed(mix_seed(self.seed, self._step)))
        self._step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["step"]

    def describe(self) -> str:
        return "callable"


class IteratorSource:
    """Batches of an iterable; one that can be iterated anew (a list, a DataLoader) starts over when it ends.

    Where it has state_dict and load_state_dict, those keep its position (tensors, numbers, strings and containers of
    them only). Where it has not, a resumed run draws and drops as many batches as were used before: exact where the
    iterable repeats itself.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        self._iterator: Iterator[Any] | None = None
        self._drawn = 0

    def next(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self.batches)
        try:
            batch = next(self._iterator)
        except StopIteration:
            if self._iterator is self.batches or isinstance(self.batches, Iterator):
                raise ValueError(
                    f"source ended after {self._drawn} batches; give one that lasts for all steps"
                ) from None
            self._iterator = iter(self.batches)
            try:
                batch = next(self._iterator)
            except StopIteration:
                raise ValueError("source is empty: it gave no batch") from None
        self._drawn += 1
        return batch

    def _stateful(self) -> bool:
        return hasattr(self.batches, "state_dict") and hasattr(self.batches, "load_state_dict")

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn, **({"inner": self.batches.state_dict()} if self._stateful() else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._stateful():
            self.batches.load_state_dict(state["inner"])
            self._iterator, self._drawn = None, state["drawn"]
            return
        if self._drawn > state["drawn"]:
            if isinstance(self.batches, Iterator):
                raise ValueError(f"source: an iterator cannot go back from batch {self._drawn} to {state['drawn']}")
            self._iterator, self._drawn = None, 0
        while self._drawn < state["drawn"]:
            self.next()

    def describe(self) -> str:
        return "iterator"


def from_model(
    model: nn.Module,
    name: str,
    batches: Iterable[Any] | Callable[[int, torch.Generator], Any],
    *,
    mask: Callable[..., Tensor] | None = None,
    positions: str = "all",
    batch_size: int = 1024,
    buffer_batches: int = 16,
    seed: int = 0,
) -> "ModelSource":
    """A source of the activations at module `name` of `model`, computed while training.

    batches: the model's inputs, as an iterable or a callable(step, generator): a tensor (one argument), a tuple
    (several) or a dict (keyword arguments). mask and positions as in `record`: padded positions never enter.
    Rows pass through a buffer of buffer_batches * batch_size rows that is shuffled each time it is full, so that the
    positions of one sequence do not fill one batch. The model runs without gradients, in eval mode for the call.
    Where several processes train together each of them runs the model on all inputs and takes its rows of what comes
    out: extract the activations once where the model is what costs.
    """
    return ModelSource(model, name, batches, mask, positions, batch_size, buffer_batches, seed)


class ModelSource:
    """Recorded activations through a shuffle buffer; see `from_model`."""

    def __init__(self, model, name, batches, mask, positions, batch_size, buffer_batches, seed) -> None:
        if batch_size < 1 or buffer_batches < 1:
            raise ValueError(f"batch_size and buffer_batches must be at least 1, got {batch_size} and {buffer_batches}")
        self.model, self.name, self.mask, self.positions = model, name, mask, positions
        self.batch_size, self.capacity, self.seed = batch_size, batch_size * buffer_batches, seed
        self.inputs = as_source(batches, batch_size, seed)
        self._buffer: Tensor | None = None
        self._cursor = self._fills = 0
        self._inputs_state = self.inputs.state_dict()  # as of the last whole fill: a cut one is done again

    def _record(self, inputs: Any) -> Tensor:
        from ..hooks import record

        taken = record(self.model, self.name, mask=self.mask, positions=self.positions)
        with evaluating(self.model), torch.no_grad(), taken as rec:
            if isinstance(inputs, dict):
                self.model(**inputs)
            else:
                self.model(*inputs) if isinstance(inputs, (tuple, list)) else self.model(inputs)
        return rec.activations

    def _fill(self) -> None:
        kept = [] if self._buffer is None else [self._buffer[self._cursor :]]
        rows, barren = sum(len(part) for part in kept), 0
        while rows < self.capacity:
            part = self._record(self.inputs.next())
            if kept:  # a restored buffer is on the CPU, wherever the model is
                kept[0] = kept[0].to(part.device)
            barren = 0 if len(part) else barren + 1
            if barren == 1000:
                raise ValueError(
                    f"source: 1000 batches in a row left no activation at {self.name!r}: is the mask right?"
                )
            kept.append(part)
            rows += len(part)
        buffer = torch.cat(kept)
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self._fills))
        self._buffer = buffer[torch.randperm(len(buffer), generator=generator).to(buffer.device)]
        self._cursor, self._fills = 0, self._fills + 1
        self._inputs_state = self.inputs.state_dict()

    def next(self) -> Tensor:
        if self._buffer is None or self._cursor + self.batch_size > len(self._buffer):
            self._fill()
        batch = self._buffer[self._cursor : self._cursor + self.batch_size]
        self._cursor += self.batch_size
        return batch

    def state_dict(self) -> dict[str, Any]:
        buffer = None if self._buffer is None else self._buffer[self._cursor :].clone()
        return {"inputs": self._inputs_state, "fills": self._fills, "buffer": buffer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inputs.load_state_dict(state["inputs"])
        self._inputs_state = state["inputs"]
        self._buffer, self._fills, self._cursor = state["buffer"], state["fills"], 0

    def describe(self) -> str:
        return (
            f"model {type(self.model).__name__} at {self.name}, batches of {self.batch_size}, buffers of "
            f"{self.capacity}, seed {self.seed}"
        )
