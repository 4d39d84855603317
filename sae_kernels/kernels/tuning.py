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
    64: SelectPlan(64, 8, 4, 1),
    128: SelectPlan(128, 4, 4, 1),
    256: SelectPlan(256, 4, 4, 2),
    512: SelectPlan(512, 2, 4, 4),
    1024: SelectPlan(1024, 1, 4, 4),
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


def _width(d: int, element_size: int) -> int:
    """Columns of a slice: what one warp loads in 16 bytes per thread, or less where rows are short."""
    most = min(256, 512 // element_size)
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
