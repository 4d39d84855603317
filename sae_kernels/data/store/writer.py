"""Writing a store: shards by number, in any order, from any number of processes; or rows, batch after batch."""

import errno
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..._seed import mix_seed
from ...ops._checks import FLOATS
from . import shards as shard_files
from .files import open_files
from .manifest import (
    MANIFEST,
    Field,
    Manifest,
    Shard,
    differences,
    read_record,
    record_bytes,
    record_name,
    shard_name,
)
from .moments import Moments
from .shards import Parts
from .store import ActivationStore

# left free on a disk: a full one breaks more than this store
RESERVE = 16 << 20
# read at once: each has the statistics of its shard
RECORDS = 64
FIRST_BATCH = "first_batch"  # of a plan: a digest, which manifests of earlier versions do not have


class StoreWriter:
    """One run of writing: its shards count from 0 and stand after those that the store has already.

    A shard counts once its record is there, which is written after the shard itself; readers see the new rows when
    finish() replaces the manifest. Killed anywhere, the same call goes on: `done()` tells which shards need no work.
    kind, fields, source: see Manifest. plan: what this run is about to add, as plain JSON values.

    ValueError, with nothing written, where the store there has another kind, fields or source, where another plan is
    under way, or where it holds other inputs already and append is False. `finished`: this very plan is there already.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        kind: str,
        fields: dict[str, Field],
        source: dict[str, Any],
        plan: dict[str, Any],
        *,
        append: bool = False,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self._files = open_files(path, storage_options)
        wanted = Manifest(kind, fields, _plain(source), pending=_plain(plan))
        found = read_manifest(path, storage_options)
        self.manifest = wanted if found is None else _continued(found, wanted, append, self._files.url)
        self.finished, self.plan = self.manifest.pending is None, plan
        self._storage_options = storage_options
        if found is None and self._files.names():
            raise FileExistsError(f"{self._files.url}: holds files that are no activation store; nothing was written")
        if self.manifest is not found:
            self._files.write(MANIFEST, [self.manifest.to_bytes()])
        elif self.finished:
            self._tidy()  # a run that was cut behind its last write

    @property
    def url(self) -> str:
        return self._files.url

    def free(self) -> int | None:
        """Bytes that can still be written there; None where nobody knows (a bucket)."""
        free = self._files.free()
        return None if free is None else max(free - RESERVE, 0)

    def done(self) -> dict[int, Shard]:
        """The shards of this run that are finished, by number."""
        return {number: shard for number, shard, _ in self._records()}

    def write(self, number: int, rows: Parts, dropped: int = 0) -> Shard:
        """Writes shard `number`, in parts that follow one another: each has tensors by field, [rows, ...], on the CPU.

        OSError where the disk is (nearly) full.
        """
        count = sum(self._checked(number, part) for part in rows)
        name = shard_name(len(self.manifest.shards) + number)
        data = shard_files.serialise(rows)
        size = sum(len(piece) for piece in data)
        free = self.free()
        if free is not None and free < size:
            raise OSError(
                errno.ENOSPC,
                f"{self.url}: {free:,} bytes are free and {name} takes {size:,}; what is finished stays, make room and "
                "start again",
            )
        try:
            # what has to be read of the rows is read while they are written: one thread keeps a disk busy
            with ThreadPoolExecutor(1, "checksum") as beside:
                facts = beside.submit(self._facts, rows, data)
                self._files.write(name, data)
            checksum, moments = facts.result()
            shard = Shard(name, count, size, checksum, dropped)
            self._files.write(record_name(name), [record_bytes(shard, moments)])
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            why = f"{self.url}: {error.strerror} while {name} was written; what is finished stays, start again later"
            raise OSError(error.errno, why) from error
        return shard

    def discard(self) -> None:
        """Forgets what an earlier, cut run of this plan wrote."""
        keep = {shard.name for shard in self.manifest.shards}
        ours = [name for name in self._files.names() if name.startswith("shard-") and name not in keep]
        # records first: a shard without one does not count
        for name in sorted(ours, key=lambda name: not name.endswith(".json")):
            self._files.remove(name)

    def finish(self, count: int) -> ActivationStore:
        """Makes the shards 0 to count - 1 of this run part of the store, and opens it.

        Called by one process, when no other one writes any more. RuntimeError where a shard is missing.
        """
        missing = set(range(count))

        def found() -> Iterator[tuple[Shard, Moments | None]]:
            for number, shard, moments in self._records():
                if number in missing:
                    missing.remove(number)
                    yield shard, moments

        manifest = self.manifest.committed(found())
        if missing:
            raise RuntimeError(f"{self.url}: {len(missing)} of {count} shards are missing, the first is {min(missing)}")
        self.manifest = manifest
        self._files.write(MANIFEST, [self.manifest.to_bytes()])
        self.finished = True
        self._tidy()
        return ActivationStore(self._files, self.manifest)

    def replace(self, number: int, rows: Parts) -> None:
        """Writes a shard of the finished store (by its number in the store) anew.

        ValueError where the new bytes are not those that the manifest names: another model or other inputs made them.
        """
        shard = self.manifest.shards[number]
        data = shard_files.serialise(rows)
        if shard_files.digest(data) != shard.sha256:
            raise ValueError(
                f"{self.url}: {shard.name} came out different from what was stored (sha256); other software or another "
                "device rounds differently: extract the store anew"
            )
        self._files.write(shard.name, data)

    def _facts(self, rows: Parts, data: list[bytes | memoryview]) -> tuple[str, Moments | None]:
        """The checksum of a shard's file and the moments of its rows."""
        checksum = shard_files.digest(data)
        if self.manifest.kind != "activations":
            return checksum, None
        return checksum, reduce(Moments.merge, (Moments.of(part["x"]) for part in rows))

    def _tidy(self) -> None:
        self._files.clean()
        self.discard()

    def _records(self) -> Iterator[tuple[int, Shard, Moments | None]]:
        """(number in this run, shard, its moments) of every finished shard, in order, a few records at a time."""
        names, first = self._files.names(), len(self.manifest.shards)
        records = sorted(name for name in names if name.startswith("shard-") and name.endswith(".json"))
        for start in range(0, len(records), RECORDS):
            for name, data in self._files.read_many(records[start : start + RECORDS]).items():
                try:
                    shard, moments = read_record(data)
                except (ValueError, TypeError, KeyError):
                    continue  # cut in the middle, on a file system without atomic writes: the shard is done again
                number = int(name[len("shard-") : -len(".json")]) - first
                if number >= 0 and names.get(shard.name) == shard.bytes:
                    yield number, shard, moments

    def _checked(self, number: int, tensors: dict[str, Tensor]) -> int:
        fields = self.manifest.fields
        if tensors.keys() != fields.keys():
            raise ValueError(f"shard {number}: fields must be {sorted(fields)}, got {sorted(tensors)}")
        rows = len(next(iter(tensors.values())))
        for name, f in fields.items():
            t = tensors[name]
            if t.dtype != f.dtype or tuple(t.shape) != (rows, *f.shape):
                wanted, came = f"{f.dtype} {(rows, *f.shape)}", f"{t.dtype} {tuple(t.shape)}"
                raise ValueError(f"shard {number}: {name} must be {wanted}, got {came}")
        return rows


class RowWriter:
    """Rows that are at hand become a store, shard_rows of them to a shard; a context manager.

        with RowWriter("acts", d=64, dtype=torch.bfloat16, source={"model": "mine"}) as writer:
            writer.add(x)                            # x [n, 64]; ids count on, or row=[n] int64

    append: add to a finished store of the same d, dtype and source. shuffle: a seed; rows are shuffled within each
    shard. position: True where add() gets positions too. Leaving the block without an error finishes the store; killed
    before that, the rows of this block are gone and those that were there stay.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        d: int,
        dtype: torch.dtype = torch.float32,
        *,
        source: dict[str, Any] | None = None,
        position: bool = False,
        shard_rows: int = 65536,
        shuffle: int | None = None,
        append: bool = False,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        for name, value in (("d", d), ("shard_rows", shard_rows)):
            if value < 1:
                raise ValueError(f"RowWriter: {name} must be at least 1, got {value}")
        if dtype not in FLOATS:
            raise ValueError(f"RowWriter: dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
        fields = {"x": Field(dtype, (d,)), **id_fields(position)}
        found = read_manifest(path, storage_options)
        run = 0 if found is None else len(found.inputs)
        plan = {"rows": "as they came", "run": run}
        self._writer = StoreWriter(
            path, "activations", fields, source or {}, plan, append=append, storage_options=storage_options
        )
        self._writer.discard()
        self._shard_rows, self._shuffle = shard_rows, shuffle
        self._parts: list[dict[str, Tensor]] = []
        self._held, self._shards = 0, 0
        self._next_id = 0 if found is None else found.rows
        self.store: ActivationStore | None = None

    def add(self, x: Tensor, row: Tensor | None = None, position: Tensor | None = None) -> None:
        """x [n, d] of the store's dtype; row [n] int64; position [n] int32. Nothing is cast. Copies x."""
        x = x.detach().cpu()
        if row is None:
            row = torch.arange(self._next_id, self._next_id + len(x))
        part = {"x": x, "row": row.cpu()} | ({} if position is None else {"position": position.cpu()})
        self._writer._checked(self._shards, part)
        self._next_id += len(x)
        done = 0
        while done < len(x):
            take = min(self._shard_rows - self._held, len(x) - done)
            self._parts.append({name: t[done : done + take].clone() for name, t in part.items()})
            self._held, done = self._held + take, done + take
            if self._held == self._shard_rows:
                self._flush()

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            if self._held:
                self._flush()
            self.store = self._writer.finish(self._shards)

    def _flush(self) -> None:
        number = len(self._writer.manifest.shards) + self._shards
        self._writer.write(self._shards, shuffled(self._parts, self._shuffle, number))
        self._parts, self._held, self._shards = [], 0, self._shards + 1


def id_fields(position: bool) -> dict[str, Field]:
    return {"row": Field(torch.int64)} | ({"position": Field(torch.int32)} if position else {})


def shuffled(parts: Parts, seed: int | None, shard: int) -> Parts:
    """The rows of a shard in an order drawn from (seed, shard), as one part; as they are for seed None."""
    if seed is None:
        return parts
    ends = list(itertools.accumulate(len(next(iter(part.values()))) for part in parts))
    generator = torch.Generator().manual_seed(mix_seed(seed, shard))
    places = torch.randperm(ends[-1], generator=generator).tensor_split(ends[:-1])
    out = {name: t.new_empty(ends[-1], *t.shape[1:]) for name, t in parts[0].items()}
    for place, part in zip(places, parts, strict=True):
        for name, t in part.items():
            out[name][place] = t
    return [out]


def read_manifest(path: str | os.PathLike, storage_options: dict[str, Any] | None = None) -> Manifest | None:
    """What stands at `path`, finished or not; None where nothing does."""
    files = open_files(path, storage_options)
    try:
        return Manifest.from_bytes(files.read(MANIFEST), files.url)
    except FileNotFoundError:
        return None


def place_of(manifest: Manifest, plan: dict[str, Any]) -> range | None:
    """The numbers of the shards that a finished run with this plan has written; None where there was none."""
    first = 0
    for run in manifest.inputs:
        if {**run, "shards": None} == {**_told_by(run, plan), "shards": None}:
            return range(first, first + run["shards"])
        first += run["shards"]
    return None


def _continued(found: Manifest, wanted: Manifest, append: bool, url: str) -> Manifest:
    """The manifest to go on with; the very `found` where nothing has to be written for that."""
    other = found.differences(wanted)
    if other:
        raise ValueError(f"{url}: the store there is another one, nothing was written: {'; '.join(other)}")
    if found.pending is not None:
        other = differences(found.pending, _told_by(found.pending, wanted.pending))
        if other:
            raise ValueError(f"{url}: a run with other inputs is under way there: {'; '.join(other)}")
        return found
    if place_of(found, wanted.pending) is not None:
        return found
    if not append:
        last = found.inputs[-1] | {"shards": None}
        other = differences(last, _told_by(last, wanted.pending | {"shards": None}))
        raise ValueError(f"{url}: the store there holds other inputs: {'; '.join(other)}; append=True adds these")
    return Manifest(found.kind, found.fields, found.source, found.inputs, wanted.pending, found.shards, found.moments)


def _told_by(run: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """The plan without what the run, from before it was noted, does not say."""
    plan = _plain(plan)
    return plan if FIRST_BATCH in run else {name: value for name, value in plan.items() if name != FIRST_BATCH}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON, so that what was read and what is given compare equal."""
    return json.loads(json.dumps(values, sort_keys=True))
