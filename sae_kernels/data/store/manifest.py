"""What a store says of itself: manifest.json for the whole, one JSON record beside each shard."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from .moments import Moments

SCHEMA = 1
MANIFEST = "manifest.json"
KINDS = ("activations", "codes")


@dataclass(frozen=True)
class Field:
    """One tensor of every shard: its dtype, and the shape of a row."""

    dtype: torch.dtype
    shape: tuple[int, ...] = ()

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Shard:
    """A finished shard file: name, rows, bytes, sha256 of the file, rows dropped for NaN or Inf."""

    name: str
    rows: int
    bytes: int
    sha256: str
    dropped: int = 0


@dataclass(frozen=True)
class Manifest:
    """kind: "activations" (field x [d]) or "codes" (fields values [k], indices [k]); both have row, the id of the input
    a row came from, and ragged ones position. source: what made the rows; a store goes on with the same one alone.
    inputs: one plan for each run that has added its shards; pending: the plan of the one under way, if any.
    moments: of x, None for codes."""

    kind: str
    fields: dict[str, Field]
    source: dict[str, Any]
    inputs: tuple[dict[str, Any], ...] = ()
    pending: dict[str, Any] | None = None
    shards: tuple[Shard, ...] = ()
    moments: Moments | None = field(default=None, compare=False)

    @property
    def complete(self) -> bool:
        """False until the first run has added its shards."""
        return bool(self.inputs)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def row_bytes(self) -> int:
        return sum(f.row_bytes for f in self.fields.values())

    def differences(self, other: "Manifest") -> list[str]:
        """What forbids going on with this store as `other`: kind, fields and source, one text each."""
        return differences(_identity(self), _identity(other))

    def to_bytes(self) -> bytes:
        facts = {
            "schema": SCHEMA,
            "complete": self.complete,
            "kind": self.kind,
            "rows": self.rows,
            "bytes": sum(shard.bytes for shard in self.shards),
            "fields": {name: {"dtype": _dtype_name(f.dtype), "shape": f.shape} for name, f in self.fields.items()},
            "source": self.source,
            "inputs": self.inputs,
            "pending": self.pending,
            "statistics": None if self.moments is None else self.moments.to_json(),
            "shards": [asdict(shard) for shard in self.shards],
        }
        return (json.dumps(facts, indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        """Raises ValueError naming `where` for anything but a manifest of this schema."""
        try:
            facts = json.loads(data)
        except ValueError as error:
            raise ValueError(f"{where}: {MANIFEST} is not JSON: {error}") from None
        schema = facts.get("schema") if isinstance(facts, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"{where}: {MANIFEST} has schema {schema!r}; this version reads and writes {SCHEMA}")
        fields = {name: Field(getattr(torch, f["dtype"]), tuple(f["shape"])) for name, f in facts["fields"].items()}
        statistics = facts["statistics"]
        moments = None if statistics is None else Moments.from_json(statistics)
        shards = tuple(Shard(**shard) for shard in facts["shards"])
        inputs = tuple(facts["inputs"])
        return cls(facts["kind"], fields, facts["source"], inputs, facts["pending"], shards, moments)

    def committed(self, records: Iterable[tuple[Shard, Moments | None]]) -> "Manifest":
        """This one and the shards of the pending plan, in the given order, after its own."""
        moments, shards = self.moments, []
        for shard, part in records:
            shards.append(shard)
            moments = part if moments is None else moments.merge(part)
        inputs = (*self.inputs, {**self.pending, "shards": len(shards)})
        return replace(self, inputs=inputs, pending=None, shards=(*self.shards, *shards), moments=moments)


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """One text for each name whose value is not the same."""
    return [
        f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


def shard_name(number: int) -> str:
    return f"shard-{number:08d}.safetensors"


def record_name(shard: str) -> str:
    """The record beside a shard file: its last write, which makes it count."""
    return shard.removesuffix(".safetensors") + ".json"


def record_bytes(shard: Shard, moments: Moments | None) -> bytes:
    return json.dumps({**asdict(shard), "statistics": None if moments is None else moments.to_json()}).encode()


def read_record(data: bytes) -> tuple[Shard, Moments | None]:
    facts = json.loads(data)
    statistics = facts.pop("statistics")
    return Shard(**facts), None if statistics is None else Moments.from_json(statistics)


def _identity(manifest: Manifest) -> dict[str, Any]:
    fields = {f"field {name}": f"{_dtype_name(f.dtype)} {list(f.shape)}" for name, f in manifest.fields.items()}
    return {"kind": manifest.kind, **fields, **manifest.source}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
