"""ActivationStore: rows on disk or in a bucket, read in order or at random through memory maps."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...nn.code import SparseCode
from ...ops import ActivationStats
from . import shards as shard_files
from .files import Files, open_files
from .manifest import MANIFEST, Field, Manifest, Shard

OPEN_LOCAL, OPEN_REMOTE = 64, 2


@dataclass(frozen=True)
class Damage:
    """A shard that is not what the manifest says, and what is wrong with it."""

    shard: int
    name: str
    problem: str

    def __str__(self) -> str:
        return f"{self.name}: {self.problem}"


class ActivationStore:
    """The rows of a finished store, numbered from 0 in the order of its shards.

        store = ActivationStore.open("acts")            # or "s3://bucket/acts"
        store.read(slice(0, 1024))                      # [1024, d], in the stored dtype
        store.read(torch.tensor([5, 3, 3]))             # rows at random, repeats allowed
        store.read(slice(0, 1024), "row")               # the ids of the inputs they came from
        store.shard(0)["x"]                             # a whole shard, memory-mapped

    kind "activations" has the field x [d]; "codes" has values [k] and indices [k]: see `code`. Both have row (int64, id
    of the input), and position (int32) where an input gives several rows. mean, var [d] fp64 are those of all finite
    rows of x. Remote shards are fetched whole; the last two are kept.
    """

    def __init__(self, files: Files, manifest: Manifest) -> None:
        self._files, self.manifest = files, manifest
        self._open: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._ends = torch.tensor([shard.rows for shard in manifest.shards], dtype=torch.int64).cumsum(0)

    @classmethod
    def open(cls, path: str | os.PathLike, storage_options: dict[str, Any] | None = None) -> "ActivationStore":
        """The store at a local path or any fsspec URL.

        Raises FileNotFoundError where there is none, ValueError where it is not finished or of another schema,
        ConnectionError for a place that cannot be reached.
        """
        files = open_files(path, storage_options)
        try:
            manifest = Manifest.from_bytes(files.read(MANIFEST), files.url)
        except FileNotFoundError:
            raise FileNotFoundError(f"{files.url}: no activation store there (no {MANIFEST})") from None
        if not manifest.complete:
            raise ValueError(f"{files.url}: this store is not finished; run what writes it again, and it goes on")
        return cls(files, manifest)

    @property
    def url(self) -> str:
        return self._files.url

    @property
    def kind(self) -> str:
        return self.manifest.kind

    @property
    def fields(self) -> dict[str, Field]:
        return self.manifest.fields

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self.manifest.shards

    @property
    def rows(self) -> int:
        return self.manifest.rows

    @property
    def bytes(self) -> int:
        """Bytes of all shard files."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def d(self) -> int:
        """Size of x, or k for codes."""
        return self.fields[self._main].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.fields[self._main].dtype

    @property
    def mean(self) -> Tensor | None:
        return None if self.manifest.moments is None else self.manifest.moments.mean

    @property
    def var(self) -> Tensor | None:
        return None if self.manifest.moments is None else self.manifest.moments.var

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        return (
            f"ActivationStore({self.url!r}: {self.kind}, {self.rows:,} rows of {self.d} x {self.dtype} "
            f"in {len(self.shards)} shards, {self.bytes / 1e6:,.1f} MB)"
        )

    def shard(self, number: int) -> dict[str, Tensor]:
        """The tensors of one shard by field, [rows of the shard, ...]; local ones are memory maps: do not write."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.shards[number]
        tensors = shard_files.load(self._files, shard)
        self._open[number] = tensors
        if len(self._open) > (OPEN_REMOTE if self._files.local(shard.name) is None else OPEN_LOCAL):
            self._open.popitem(last=False)
        return tensors

    def read(self, rows: slice | Tensor | Sequence[int], field: str | None = None) -> Tensor:
        """A copy of the given rows of one field (x, or values), [n, ...].

        rows: a slice, or row numbers in [0, rows) in any order. IndexError for one outside, KeyError for no such field.
        """
        field = self._field(field)
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.rows)
            if step == 1:
                return self._span(start, max(start, stop), field)
            rows = torch.arange(start, stop, step) if (stop - start) * step > 0 else torch.empty(0, dtype=torch.int64)
        return self._gather(self._numbers(rows), field)

    def code(self, rows: slice | Tensor | Sequence[int]) -> SparseCode:
        """The codes of the given rows, ready for the SAE's decode. ValueError for a store of activations."""
        if self.kind != "codes":
            raise ValueError(f"{self.url}: code() needs a store of codes, this one holds {self.kind}")
        source, extra = self.manifest.source, {}
        for name in ("offset", "scale"):
            if name in self.fields:
                extra[name] = self.read(rows, name)
            elif name in source:  # one for all rows
                extra[name] = torch.tensor(source[name])
        return SparseCode(self.read(rows), self.read(rows, "indices"), source["d_sae"], **extra)

    def stats(self, **options: Any) -> ActivationStats:
        """What the latents do over all rows of a store of codes; options: those of ActivationStats. Its ids are row
        numbers of the store."""
        if self.kind != "codes":
            raise ValueError(f"{self.url}: stats() needs a store of codes, this one holds {self.kind}")
        stats = ActivationStats(self.manifest.source["d_sae"], **options)
        for number in range(len(self.shards)):
            tensors = self.shard(number)
            stats.update(tensors["values"], tensors["indices"])
        return stats

    def verify(self) -> list[Damage]:
        """Reads every byte; the shards whose size, sha256 or tensors are not what the manifest says. [] is good."""
        found = []
        for number, shard in enumerate(self.shards):
            problem = shard_files.check(self._files, shard, self.fields)
            if problem is not None:
                found.append(Damage(number, shard.name, problem))
        return found

    @property
    def _main(self) -> str:
        return "x" if self.kind == "activations" else "values"

    def _field(self, name: str | None) -> str:
        name = self._main if name is None else name
        if name not in self.fields:
            raise KeyError(f"{self.url}: no field {name!r}; there is {', '.join(self.fields)}")
        return name

    def _numbers(self, rows: Tensor | Sequence[int]) -> Tensor:
        numbers = torch.as_tensor(rows)
        if numbers.numel() == 0:
            return torch.empty(0, dtype=torch.int64)
        if numbers.dim() != 1 or numbers.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"read: rows must be a slice or 1-d integers, got {numbers.dtype} {tuple(numbers.shape)}")
        low, high = (int(end) for end in numbers.aminmax())
        if low < 0 or high >= self.rows:
            raise IndexError(f"read: rows must be in [0, {self.rows}), got {low} to {high}")
        return numbers.long()

    def _empty(self, rows: int, field: str) -> Tensor:
        f = self.fields[field]
        return torch.empty(rows, *f.shape, dtype=f.dtype)

    def _span(self, start: int, stop: int, field: str) -> Tensor:
        out, done = self._empty(stop - start, field), 0
        number = int(torch.searchsorted(self._ends, start, right=True))
        while done < stop - start:
            begin = int(self._ends[number - 1]) if number else 0
            part = self.shard(number)[field][start + done - begin : stop - begin]
            out[done : done + len(part)] = part
            done, number = done + len(part), number + 1
        return out

    def _gather(self, rows: Tensor, field: str) -> Tensor:
        out = self._empty(len(rows), field)
        of = torch.searchsorted(self._ends, rows, right=True)
        # the rows of one shard together: each shard is opened once
        for number in of.unique().tolist():
            here = (of == number).nonzero().squeeze(1)
            begin = int(self._ends[number - 1]) if number else 0
            out[here] = self.shard(number)[field][rows[here] - begin]
        return out
