"""One extraction as plain data: what an engine hands to its workers, wherever they run."""

import errno
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ..._need import need
from ..store import ActivationStore, StoreWriter
from ..store.manifest import Field
from ..store.writer import FIRST_BATCH
from .inputs import Inputs
from .pipeline import OnBatch, Plan, run_shards
from .recipe import Recipe


@dataclass(frozen=True)
class Facts:
    """What the first batch tells: the store's fields, what made the rows, rows kept of how many positions, of how many
    inputs, and what tells the batch from others."""

    fields: dict[str, Field]
    source: dict[str, Any]
    rows: int
    positions: int
    inputs: int
    first: str

    @property
    def row_bytes(self) -> int:
        return sum(f.row_bytes for f in self.fields.values())


@dataclass(frozen=True)
class Job:
    """Everything but the model itself, which each worker makes for itself: make_recipe()."""

    make_recipe: Callable[[], Recipe]
    inputs: Inputs
    store: str
    shard_bytes: int
    shuffle: int | None = None
    first_id: int = 0
    nan: str = "raise"
    writers: int = 1
    append: bool = False
    storage_options: dict[str, Any] | None = field(default=None, repr=False)

    def probe(self, recipe: Recipe) -> Facts:
        """Runs the first batch, whole."""
        batch = next(iter(self.inputs.read([0])), None)
        if batch is None:
            raise ValueError("extract: inputs are empty: they gave no batch")
        with recipe:
            rows = recipe.probe(batch)
        source = {**recipe.describe(), "nan": self.nan}
        inputs = len(batch.ids)
        return Facts(rows.fields(), source, len(rows.place), inputs * rows.width, inputs, recipe.first)

    def plan(self, facts: Facts) -> Plan:
        """Shards of whole batches, of at most shard_bytes where a batch is not larger and none has more positions than
        the first, or than the inputs say."""
        widest = getattr(self.inputs, "widest", None) or 0
        positions = max(facts.positions, facts.inputs * widest if "position" in facts.fields else 0, 1)
        per_batch = positions * facts.row_bytes
        return Plan(self.inputs.batches, max(1, self.shard_bytes // per_batch), self.shuffle, self.first_id)

    def writer(self, facts: Facts) -> StoreWriter:
        plan = self.plan(facts)
        added = {"batches_per_shard": plan.batches_per_shard, "shuffle": plan.shuffle, "first_id": plan.first_id}
        return StoreWriter(
            self.store,
            "codes" if "values" in facts.fields else "activations",
            facts.fields,
            facts.source,
            {**self.inputs.describe(), **added, FIRST_BATCH: facts.first},
            append=self.append,
            storage_options=self.storage_options,
        )

    def run(
        self, recipe: Recipe, facts: Facts, shards: Iterable[int], write: Callable, on_batch: OnBatch | None = None
    ) -> None:
        with recipe:
            run_shards(
                recipe,
                self.inputs,
                self.plan(facts),
                shards,
                write,
                nan=self.nan,
                writers=self.writers,
                on_batch=on_batch,
            )

    def finish(self, writer: StoreWriter, facts: Facts) -> ActivationStore:
        """Commits the manifest; for one process, when all shards are written."""
        shards = self.plan(facts).shards
        return writer.finish(max(writer.done(), default=-1) + 1 if shards is None else shards)


@dataclass
class Progress:
    """The size before, a bar with rows/s, bytes/s and ETA while it runs."""

    job: Job
    shown: bool = True
    rows: int = 0
    bytes: int = 0
    _bar: Any = None
    _start: float = 0.0

    def begin(self, facts: Facts, writer: StoreWriter, done: int) -> None:
        """Says what is about to be written. OSError where it cannot fit on the disk."""
        plan, batches = self.job.plan(facts), self.job.inputs.batches
        size = "of unknown number"
        if batches is not None:
            rows = facts.rows * batches
            expected = round(rows * facts.row_bytes * (1 - done / plan.shards))
            size = f"about {rows:,} rows, {rows * facts.row_bytes / 1e6:,.1f} MB in {plan.shards} shards"
            free = writer.free()
            if free is not None and free < expected:
                raise OSError(
                    errno.ENOSPC,
                    f"{writer.url}: {free:,} bytes are free and about {expected:,} are to come; nothing was added",
                )
        made = ", ".join(f"{name} {str(f.dtype)[6:]} {list(f.shape)}" for name, f in facts.fields.items())
        if self.shown:
            print(f"{writer.url}: {size}; a row is {made}", file=sys.stderr)
            if done:
                print(f"{writer.url}: {done} shards are there already, going on", file=sys.stderr)
            tqdm = need("tqdm", "the progress bar (progress=True)", "store")
            held = min(done * plan.batches_per_shard, batches) if batches is not None else 0
            self._bar = tqdm.tqdm(total=batches, initial=held, desc="extract", unit="batch")
        self._start = time.monotonic()

    def __call__(self, rows: int, size: int, batches: int = 1) -> None:
        self.rows, self.bytes = self.rows + rows, self.bytes + size
        if self._bar is not None:
            seconds = max(time.monotonic() - self._start, 1e-9)
            rates = {"rows/s": f"{self.rows / seconds:,.0f}", "MB/s": f"{self.bytes / seconds / 1e6:,.1f}"}
            self._bar.set_postfix(rates, refresh=False)
            self._bar.update(batches)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
