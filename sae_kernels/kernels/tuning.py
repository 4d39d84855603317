"""Configurations of the GPU kernels, by the GPU and the shape of the weights; the number of rows is never part of one.

tuning.json holds what `python -m benchmarks.gpu --tune` has measured: GPU name -> kind of plan -> bucket of shapes ->
the fields that differ from those here. Everywhere else these hold: estimates from compiled code (registers, spills).
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

TABLE = Path(__file__).with_suffix(".json")
LARGEST_K = 341  # beyond it the buffers below would pass 1024 keys, whose sorting network takes a minute to compile
Plan = TypeVar("Plan")
_trying: dict[str, dict[str, Any]] = {}


@cache
def table() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """GPU name -> kind -> bucket -> fields."""
    return json.loads(TABLE.read_text())


def gpu() -> str | None:
    """Name of the current GPU."""
    return _name(torch.cuda.current_device()) if torch.cuda.is_available() else None


@cache
def _name(device: int) -> str:
    return torch.cuda.get_device_name(device)


@contextlib.contextmanager
def trying(kind: str, **fields: Any) -> Iterator[None]:
    """Inside, plans of that kind have these fields."""
    before = _trying.get(kind, {})
    _trying[kind] = {**before, **fields}
    try:
        yield
    finally:
        _trying[kind] = before


def bucket(d: int, element_size: int) -> str:
    """Rows of d elements: "element size:next power of two", from 32 to 4096."""
    return f"{element_size}:{min(4096, max(32, 1 << (d - 1).bit_length()))}"


def _tuned(kind: str, where: str, plan: Plan) -> Plan:
    """The plan with what was measured on this GPU in that bucket in place of the estimates."""
    fields = {**table().get(gpu(), {}).get(kind, {}).get(where, {})} if table() else {}
    fields |= _trying.get(kind, {})
    return replace(plan, **fields) if fields else plan


@dataclass(frozen=True)
class SlabPlan:
    """nbytes: fp32 products of one chunk, which stay in the L2 cache of an A100 (40 MB) or H200 (60 MB); largest_fused:
    the longest row of x that goes by the fused path instead.
    """

    nbytes: int = 32 * 2**20
    largest_fused: int = 512


def slab_plan(element_size: int) -> SlabPlan:
    return _tuned("slab", str(element_size), SlabPlan())


@dataclass(frozen=True)
class ShortPlan:
    """Of CUDA C++, for rows that registers hold: their first bound comes from one in `share` of the latents."""

    share: int


@dataclass(frozen=True)
class LongPlan:
    """Of CUDA C++, for longer rows. panels: whether they go by panels, without a slab, on a GPU that can; nbytes: of a
    slab.
    """

    panels: bool
    nbytes: int = SlabPlan.nbytes


def short_plan(d_in: int, element_size: int) -> ShortPlan:
    """Where rows are short a second product of all latents costs less than full buffers, as an H200 measured it."""
    return _tuned("short", bucket(d_in, element_size), ShortPlan(1 if d_in <= 64 else 4 if d_in <= 128 else 16))


def long_plan(d_in: int, element_size: int) -> LongPlan:
    """An H200 encoded rows of 1536 and 4096 faster by panels; shorter ones were not tried."""
    return _tuned("long", bucket(d_in, element_size), LongPlan(panels=d_in > 1024))


@dataclass(frozen=True)
class SelectPlan:
    """P: keys in a row's buffer and groups in its first pass; ROWS: rows of one program."""

    P: int
    ROWS: int
    warps: int
    rescan_warps: int


SELECT = {
    64: SelectPlan(64, 8, 4, 2),
    128: SelectPlan(128, 4, 4, 1),
    256: SelectPlan(256, 4, 4, 2),
    512: SelectPlan(512, 2, 4, 4),
    1024: SelectPlan(1024, 1, 4, 8),
}


def select_plan(k: int) -> SelectPlan:
    """Room for 3k keys: k from before and, of random data, about 1.2k new ones."""
    plan = SELECT[next(P for P in SELECT if P >= 3 * k)]
    return _tuned("select", str(plan.P), plan)


def whole(rows: int) -> int:
    """So many rows of anything end on 16 bytes: a chunk's first address tells a kernel nothing new."""
    return rows // 16 * 16 or rows


def slab_shape(rows: int, d_sae: int, nbytes: int) -> tuple[int, int]:
    """Rows and latents of one slab: whole rows where 2048 of them fit, else square pieces, so W is read seldom."""
    cells = nbytes // 4
    if rows * d_sae <= cells:
        return rows, d_sae
    columns = d_sae if d_sae <= cells // 2048 else 4096
    return min(rows, whole(cells // columns)), columns


@dataclass(frozen=True)
class DecodePlan:
    """ROWS x BLOCK_D outputs per program; UNROLL entries of k in flight. dense_below: with at most so many latents per
    entry of a row, codes are multiplied whole; 0, as long as no GPU has measured it.
    """

    ROWS: int
    BLOCK_D: int
    UNROLL: int
    warps: int
    dense_below: int = 0


@dataclass(frozen=True)
class DotPlan:
    """BLOCK_K entries of one row against BLOCK_D columns at a time: 4 KiB, for one warp."""

    BLOCK_K: int
    BLOCK_D: int
    warps: int


@dataclass(frozen=True)
class SumsPlan:
    """ENTRIES rows in flight, BLOCK_D columns per program: 2 KiB, which one warp adds without waiting for another."""

    ENTRIES: int
    BLOCK_D: int
    warps: int


SLOT_BYTES = 16 * 2**20  # partial sums of latents with more than one chunk
WIDTHS = (32, 64, 128, 256)


def widest_row(element_size: int) -> int:
    """Columns that one warp loads in 16 bytes per thread: the longest row of one slice."""
    return min(256, 512 // element_size)


def _width(d: int, element_size: int) -> int:
    """Columns of a slice."""
    most = widest_row(element_size)
    return next((w for w in WIDTHS if w >= min(d, most)), most)


def decode_plan(d_out: int, element_size: int) -> DecodePlan:
    plan = DecodePlan(ROWS=4, BLOCK_D=_width(d_out, element_size), UNROLL=4, warps=4)
    return _tuned("decode", bucket(d_out, element_size), plan)


def dot_plan(k: int, d_out: int, element_size: int) -> DotPlan:
    width = _width(d_out, element_size)
    most = max(4, 4096 // (width * element_size))
    plan = DotPlan(BLOCK_K=next((b for b in (4, 8, 16, 32) if b >= min(k, most)), most), BLOCK_D=width, warps=1)
    return _tuned("dot", bucket(d_out, element_size), plan)


def sums_plan(d: int, element_size: int) -> SumsPlan:
    width = _width(d, element_size)
    plan = SumsPlan(ENTRIES=max(4, 2048 // (width * element_size)), BLOCK_D=width, warps=1)
    return _tuned("sums", bucket(d, element_size), plan)


def chunk_length(entries: int, d: int, element_size: int) -> int:
    """Entries of one chunk: at least 256, more where the partial sums would pass SLOT_BYTES."""
    partial = 2 * entries * d * (8 if element_size == 8 else 4)
    return max(256, -(-partial // SLOT_BYTES))


@dataclass(frozen=True)
class Tile:
    """A tile of the fused product; groups of 2^LEVELS columns leave it."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    LEVELS: int
    warps: int
    stages: int
    TILES: int = 8
    GROWTH: int = 2
    AT_ONCE: int = 32


@dataclass(frozen=True)
class FusedPlan(Tile):
    """head: latents that go through a slab first; first_step: the sample after them; room: groups per row and phase."""

    head: int = 0
    first_step: int = 1
    room: int = 0
    rows: int = 1


TILE = {2: Tile(128, 128, 64, 3, 8, 3), 4: Tile(64, 128, 32, 3, 8, 3)}  # by element size
RESCAN_D = 8
MOST_REGISTERS = 255  # left alone, ptxas spills a few addresses for more occupancy
GROUP_BYTES = 96 * 2**20  # large chunks of rows: some thirty launches serve each


def fused_tile(d_in: int, element_size: int) -> Tile:
    return _tuned("fused", bucket(d_in, element_size), TILE[element_size])


def first_step(d_sae: int, k: int, growth: int = Tile.GROWTH) -> int:
    """Every how many-th latent the first sample takes: at least 8k and 256 of them; 1 where there are too few."""
    step = 1
    while d_sae // (step * growth) >= max(8 * k, 256):
        step *= growth
    return step


def fused_plan(d_in: int, d_sae: int, k: int, element_size: int) -> FusedPlan:
    """room: a phase brings about k (GROWTH - 1) new keys, and at most so many groups, of random data."""
    tile = fused_tile(d_in, element_size)
    step = first_step(d_sae, k, tile.GROWTH)
    room = -(-(2 * k * (tile.GROWTH - 1) + 24) // 8) * 8
    head = -(-2 * k // 16) * 16
    cells = slab_plan(element_size).nbytes // 4 // max(head, d_sae // step + 1)
    rows = min(cells, GROUP_BYTES // (room * 4 * (1 + 2**tile.LEVELS)))
    return FusedPlan(**vars(tile), head=head, first_step=step, room=room, rows=max(1, rows // 128 * 128))
