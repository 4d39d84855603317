"""What a model is fed with while its activations are extracted: batches by number, so that a run can go on anywhere."""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ..._need import need

_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@dataclass(frozen=True)
class Batch:
    """value: what the model takes (a tensor, a tuple of arguments or a dict of them); ids [B] int64: of each input."""

    value: Any
    ids: Tensor


class Inputs(Protocol):
    """batches: how many; None where only the end tells. seekable: any batch can be had without those before it. It may
    also have widest: the most positions that an input can give, where batches differ in it."""

    batches: int | None
    seekable: bool

    def read(self, numbers: Iterable[int]) -> Iterator[Batch]:
        """The batches of these numbers, in that order, up to the end. Asks for a number only when its turn comes."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain JSON values that tell these inputs from others."""
        ...


def as_inputs(source: Any, batch_size: int = 256, columns: list[str] | None = None) -> Inputs:
    """The Inputs behind a source; ids count the inputs from 0.

    source: a tensor, a tuple or a dict of tensors of one length; a DataLoader without shuffling or a map-style Dataset;
    a .parquet file (`columns` of it: each batch is a dict, numbers as tensors, anything else as lists); an iterable of
    batches, which cannot be sought: a resumed run draws and drops what is done, exact where it repeats itself; or
    anything with read, describe, batches and seekable. For a function of input numbers see CallableInputs.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an int of at least 1, got {batch_size!r}")
    if columns is not None and not _is_parquet(source):
        raise ValueError(f"columns are those of a .parquet file, got {type(source).__name__}")
    if all(hasattr(source, name) for name in ("read", "describe", "batches", "seekable")):
        return source
    if isinstance(source, DataLoader):
        return _of_loader(source)
    if _is_parquet(source):
        return ParquetInputs(source, batch_size, columns)
    if isinstance(source, (Tensor, tuple, Mapping)):
        return TensorInputs(source, batch_size)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, (str, list)):
        return DatasetInputs(source, batch_size)
    if isinstance(source, Iterable) and not isinstance(source, (str, Path)):
        return IteratorInputs(source)
    raise TypeError(
        "inputs must be tensors, a DataLoader, a Dataset, a .parquet file or an iterable of batches, "
        f"got {type(source).__name__}{f' {source!s}' if isinstance(source, (str, Path)) else ''}"
    )


class CallableInputs:
    """make(start, stop) -> the model's inputs number start to stop - 1, out of `count`, whenever and wherever asked.

    name: tells these inputs from others in the store (the function's name where None). widest: the most positions that
    an input can give, where batches differ in it.
    """

    seekable = True

    def __init__(
        self,
        make: Callable[[int, int], Any],
        count: int,
        batch_size: int,
        name: str | None = None,
        widest: int | None = None,
    ) -> None:
        if count < 1 or batch_size < 1:
            raise ValueError(f"count and batch_size must be at least 1, got {count} and {batch_size}")
        self.make, self.count, self.batch_size, self.widest = make, count, batch_size, widest
        self.name = name or getattr(make, "__qualname__", type(make).__name__)
        self.batches = -(-count // batch_size)

    def read(self, numbers: Iterable[int]) -> Iterator[Batch]:
        for number in numbers:
            if number >= self.batches:
                return
            start, stop = number * self.batch_size, min((number + 1) * self.batch_size, self.count)
            yield Batch(self.make(start, stop), torch.arange(start, stop))

    def describe(self) -> dict[str, Any]:
        return {"inputs": self.name, "count": self.count, "batch_size": self.batch_size}


class TensorInputs(CallableInputs):
    """Slices of a tensor, of a tuple (several arguments) or of a dict (keyword arguments) of tensors."""

    def __init__(self, tensors: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor], batch_size: int) -> None:
        self._tensors = tensors
        parts = self._parts()
        if not parts or not all(isinstance(t, Tensor) and t.dim() for _, t in parts):
            raise TypeError("inputs must be tensors [inputs, ...]")
        lengths = sorted({len(t) for _, t in parts})
        if len(lengths) != 1 or not lengths[0]:
            raise ValueError(f"inputs must have one length of at least 1, got lengths {lengths}")
        super().__init__(self._slice, lengths[0], batch_size, "tensors")

    def _parts(self) -> list[tuple[str, Tensor]]:
        if isinstance(self._tensors, Tensor):
            return [("", self._tensors)]
        named = self._tensors.items() if isinstance(self._tensors, Mapping) else enumerate(self._tensors)
        return [(str(name), t) for name, t in named]

    def _slice(self, start: int, stop: int) -> Any:
        if isinstance(self._tensors, Tensor):
            return self._tensors[start:stop]
        if isinstance(self._tensors, Mapping):
            return {name: t[start:stop] for name, t in self._tensors.items()}
        return tuple(t[start:stop] for t in self._tensors)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "content": content_digest(self._parts())}


class DatasetInputs:
    """A map-style Dataset through a DataLoader, whose workers read ahead."""

    seekable = True

    def __init__(self, dataset: Any, batch_size: int, collate: Any = None, drop_last: bool = False, **loader: Any):
        self.dataset, self.batch_size, self._collate, self._loader = dataset, batch_size, collate, loader
        self.count = len(dataset)
        self.batches = self.count // batch_size if drop_last else -(-self.count // batch_size)
        if not self.batches:
            raise ValueError(f"inputs: the dataset has {self.count} inputs, which is no batch of {batch_size}")

    def _span(self, number: int) -> range:
        return range(number * self.batch_size, min((number + 1) * self.batch_size, self.count))

    def read(self, numbers: Iterable[int]) -> Iterator[Batch]:
        wanted = itertools.takewhile(lambda number: number < self.batches, numbers)
        # workers draw ahead: what was drawn waits here for its batch
        spans: list[range] = []

        def sampler() -> Iterator[list[int]]:
            for number in wanted:
                spans.append(self._span(number))
                yield list(spans[-1])

        loader = DataLoader(self.dataset, batch_sampler=_Sampler(sampler), collate_fn=self._collate, **self._loader)
        for value in loader:
            yield Batch(value, torch.tensor(spans.pop(0)))

    def describe(self) -> dict[str, Any]:
        kind = type(self.dataset).__qualname__
        return {"inputs": kind, "count": self.count, "batches": self.batches, "batch_size": self.batch_size}


class _Sampler:
    def __init__(self, make: Callable[[], Iterator[list[int]]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[list[int]]:
        return self._make()


class ParquetInputs:
    """Rows of a Parquet file, a dict of columns to a batch; a batch is read from its row groups alone."""

    seekable = True

    def __init__(self, path: str | os.PathLike, batch_size: int, columns: list[str] | None = None) -> None:
        parquet = need("pyarrow.parquet", "reading Parquet", "data")
        self.path, self.batch_size = Path(path), batch_size
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file")
        try:
            facts = parquet.ParquetFile(self.path)
        except need("pyarrow", "reading Parquet", "data").ArrowInvalid as error:
            raise ValueError(f"{self.path}: not a readable Parquet file: {error}") from None
        names = facts.schema_arrow.names
        self.columns = names if columns is None else columns
        absent = [name for name in self.columns if name not in names]
        if absent:
            raise ValueError(f"{self.path}: column {absent[0]!r} is missing; the file has {', '.join(names)}")
        groups = range(facts.metadata.num_row_groups)
        self._ends = list(itertools.accumulate(facts.metadata.row_group(i).num_rows for i in groups))
        self.count = facts.metadata.num_rows
        if not self.count:
            raise ValueError(f"{self.path}: the file has no rows")
        self.batches = -(-self.count // batch_size)

    def read(self, numbers: Iterable[int]) -> Iterator[Batch]:
        arrow, parquet = need("pyarrow", "reading Parquet", "data"), need("pyarrow.parquet", "reading Parquet", "data")
        with parquet.ParquetFile(self.path) as file:
            group, table = -1, None
            for number in numbers:
                if number >= self.batches:
                    return
                start, stop = number * self.batch_size, min((number + 1) * self.batch_size, self.count)
                parts = []
                for i, end in enumerate(self._ends):
                    begin = self._ends[i - 1] if i else 0
                    if begin < stop and start < end:
                        if i != group:
                            group, table = i, file.read_row_group(i, columns=self.columns)
                        low = max(start - begin, 0)
                        parts.append(table.slice(low, min(stop, end) - begin - low))
                yield Batch(_columns(arrow, arrow.concat_tables(parts)), torch.arange(start, stop))

    def describe(self) -> dict[str, Any]:
        facts = {"inputs": self.path.name, "bytes": self.path.stat().st_size, "count": self.count}
        return {**facts, "columns": self.columns, "batch_size": self.batch_size}


class IteratorInputs:
    """Batches in the order in which an iterable gives them; ids count the first dimension of the first tensor."""

    batches = None
    seekable = False

    def __init__(self, source: Iterable[Any]) -> None:
        self._source, self._iterator = source, None
        self._drawn, self._ids = 0, 0
        self._held: Batch | None = None

    def read(self, numbers: Iterable[int]) -> Iterator[Batch]:
        for number in numbers:
            if number < self._drawn - 1 or (number == self._drawn - 1 and self._held is None):
                if isinstance(self._source, Iterator):
                    raise ValueError(f"inputs: an iterator cannot go back to batch {number} of {self._drawn} drawn")
                self._iterator, self._drawn, self._ids = None, 0, 0
            while self._drawn <= number:
                if not self._draw():
                    return
            yield self._held

    def _draw(self) -> bool:
        self._iterator = iter(self._source) if self._iterator is None else self._iterator
        try:
            value = next(self._iterator)
        except StopIteration:
            return False
        count = _first_length(value)
        self._held = Batch(value, torch.arange(self._ids, self._ids + count))
        self._drawn, self._ids = self._drawn + 1, self._ids + count
        return True

    def describe(self) -> dict[str, Any]:
        return {"inputs": type(self._source).__qualname__}


def content_digest(values: Iterable[tuple[str, Any]]) -> str:
    """sha256 over the names, dtypes, shapes and values of tensors, also those in dicts and lists; plain values count
    too, of other objects the type alone.
    """
    sha = hashlib.sha256()
    for name, t in _leaves(values):
        if not isinstance(t, Tensor):
            plain = t is None or isinstance(t, (str, bytes, int, float))
            sha.update(f"{name} {type(t).__qualname__} {t if plain else ''!r};".encode())
            continue
        t = t.detach()
        sha.update(f"{name} {t.dtype} {tuple(t.shape)};".encode())
        # a piece at a time: a tensor may live on another device, or be larger than what is free here
        for piece in t.reshape(-1).split(1 << 24):
            sha.update(memoryview(piece.cpu().contiguous().view(torch.uint8).numpy()))
    return sha.hexdigest()[:32]


def _leaves(values: Iterable[tuple[Any, Any]], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values:
        if isinstance(value, Mapping):
            yield from _leaves(value.items(), f"{prefix}{name}.")
        elif isinstance(value, (tuple, list)):
            yield from _leaves(enumerate(value), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _of_loader(loader: DataLoader) -> Inputs:
    if isinstance(loader.dataset, IterableDataset):
        return IteratorInputs(loader)
    if isinstance(loader.sampler, _RANDOM) or isinstance(getattr(loader.batch_sampler, "sampler", None), _RANDOM):
        raise ValueError(
            "inputs: this DataLoader shuffles, so a run that is cut could not go on where it was; "
            "give it shuffle=False, and extract() a shuffle seed"
        )
    every = isinstance(loader.sampler, SequentialSampler) and loader.sampler.data_source is loader.dataset
    if loader.batch_size is None or not every:
        return IteratorInputs(loader)
    given = ("num_workers", "prefetch_factor", "worker_init_fn", "multiprocessing_context", "timeout")
    options = {name: getattr(loader, name) for name in given}
    return DatasetInputs(loader.dataset, loader.batch_size, loader.collate_fn, loader.drop_last, **options)


def _is_parquet(source: Any) -> bool:
    return isinstance(source, (str, Path)) and Path(source).suffix == ".parquet"


def _columns(arrow: Any, table: Any) -> dict[str, Any]:
    """Numbers become tensors, everything else lists."""
    out = {}
    for name in table.column_names:
        column = table.column(name)
        number = arrow.types.is_integer(column.type) or arrow.types.is_floating(column.type)
        if number and not column.null_count:
            out[name] = torch.from_numpy(column.to_numpy().copy())
        else:
            out[name] = column.to_pylist()
    return out


def _first_length(value: Any) -> int:
    if isinstance(value, Tensor) and value.dim():
        return len(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    for part in parts:
        if isinstance(part, Tensor) and part.dim():
            return len(part)
    raise TypeError(f"inputs: a batch must be, or hold, a tensor [B, ...], got {type(value).__name__}")
