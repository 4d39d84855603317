"""Configurations of the Triton kernels, by the shape of the weights; the number of rows is never part of one.

The figures are estimates from compiled code (registers, spills), not from timings: no GPU has run them yet.
"""

from dataclasses import dataclass

SLAB_BYTES = 32 * 2**20  # fp32 products of one chunk: stays in the L2 cache of an A100 (40 MB) or H200 (60 MB)
LARGEST_K = 341  # beyond it the buffers below would pass 1024 keys, whose sorting network takes a minute to compile


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
    return SELECT[next(P for P in SELECT if P >= 3 * k)]


def slab_shape(rows: int, d_sae: int) -> tuple[int, int]:
    """Rows and latents of one slab: whole rows where 2048 of them fit, else square pieces, so W is read seldom."""
    cells = SLAB_BYTES // 4
    if rows * d_sae <= cells:
        return rows, d_sae
    columns = d_sae if d_sae <= cells // 2048 else 4096
    return min(rows, cells // columns), columns


@dataclass(frozen=True)
class DecodePlan:
    """ROWS x BLOCK_D outputs per program; UNROLL entries of k in flight."""

    ROWS: int
    BLOCK_D: int
    UNROLL: int
    warps: int


@dataclass(frozen=True)
class DotPlan:
    """BLOCK_K entries of one row against BLOCK_D columns at a time."""

    BLOCK_K: int
    BLOCK_D: int
    warps: int


@dataclass(frozen=True)
class SumsPlan:
    """ENTRIES rows in flight, BLOCK_D columns per program."""

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
    return DecodePlan(ROWS=4, BLOCK_D=_width(d_out, element_size), UNROLL=4, warps=4)


def dot_plan(k: int, d_out: int, element_size: int) -> DotPlan:
    return DotPlan(BLOCK_K=next((b for b in (4, 8) if b >= k), 16), BLOCK_D=_width(d_out, element_size), warps=4)


def sums_plan(d: int, element_size: int) -> SumsPlan:
    return SumsPlan(ENTRIES=8, BLOCK_D=_width(d, element_size), warps=4)


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


@dataclass(frozen=True)
class FusedPlan(Tile):
    """head: latents that go through a slab first; first_step: the sample after them; room: groups per row and phase."""

    GROWTH: int
    TILES: int
    AT_ONCE: int
    head: int
    first_step: int
    room: int
    rows: int


TILE = {2: Tile(128, 128, 64, 3, 8, 3), 4: Tile(64, 128, 32, 3, 8, 3)}  # by element size
GROWTH = 2
AT_ONCE = 32
TILES = 8
RESCAN_D = 8
RESCAN_REGISTERS = 255  # left alone, ptxas spills a few addresses for occupancy, which a rare fallback does not need
GROUP_BYTES = 96 * 2**20  # large chunks of rows: some thirty launches serve each
LARGEST_FUSED_D_IN = 512


def first_step(d_sae: int, k: int) -> int:
    """Every how many-th latent the first sample takes: at least 8k and 256 of them; 1 where there are too few."""
    step = 1
    while d_sae // (step * GROWTH) >= max(8 * k, 256):
        step *= GROWTH
    return step


def fused_plan(d_in: int, d_sae: int, k: int, element_size: int) -> FusedPlan:
    """room: a phase brings about k (GROWTH - 1) new keys, and at most so many groups, of random data."""
    step, tile = first_step(d_sae, k), TILE[element_size]
    room = -(-(2 * k * (GROWTH - 1) + 24) // 8) * 8
    head = -(-2 * k // 16) * 16
    cells = SLAB_BYTES // 4 // max(head, d_sae // step + 1)
    rows = min(cells, GROUP_BYTES // (room * 4 * (1 + 2**tile.LEVELS)))
    return FusedPlan(
        **vars(tile),
        GROWTH=GROWTH,
        TILES=TILES,
        AT_ONCE=AT_ONCE,
        head=head,
        first_step=step,
        room=room,
        rows=max(1, rows // 128 * 128),
    )
