"""topk_encode in CUDA C++: the kernel of csrc/cuda/topk_fused.cuh, which writes no pre-activations, where the shape
lets it; else that of topk_select.cuh, or with thresholds threshold_select.cuh, around products in slabs that stay in
L2. Where tuning.LongPlan says so, that of topk_panels.cuh takes long rows without a slab.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import tuning
from ..kernels.product import product

LARGEST_SELECT = 1024  # the buffers' limit: kLargestSelect in topk_slab.cuh
_NONE, _ABS = 1, 2

_lib = torch.library.Library("sae_kernels", "FRAGMENT")
_lib.define(
    "cuda_topk_select(Tensor slab, Tensor? bias, Tensor? mask, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) indices,"
    " Tensor(d!) trims, int first, bool last, int activation) -> ()"
)
_lib.define(
    "cuda_threshold_select(Tensor slab, Tensor? bias, Tensor? mask, Tensor threshold, Tensor(d!) passed,"
    " Tensor(a!) keys, Tensor(b!) values, Tensor(c!) indices, int first, bool last, int activation) -> ()"
)
_lib.define(
    "cuda_topk_write_keys(Tensor slab, Tensor? bias, Tensor? mask, Tensor? threshold, Tensor(b!)? passed,"
    " Tensor(a!) keys, int activation) -> ()"
)
_lib.define("cuda_topk_write_codes(Tensor keys, Tensor(a!) values, Tensor(b!) indices, int activation) -> ()")
_lib.define(
    "cuda_topk_encode_fused(Tensor x, Tensor W, Tensor? bias, Tensor? threshold, Tensor(c!)? passed, Tensor? count,"
    " Tensor(e!)? list, Tensor(f!)? norms, Tensor(d!) image, Tensor(a!) values, Tensor(b!) indices, int activation,"
    " int groups, int stages, int sample) -> ()"
)
_lib.define(
    "cuda_topk_encode_panels(Tensor x, Tensor W, Tensor lines, Tensor(a!) pool, Tensor(b!) keys, int activation,"
    " int strip_tiles) -> ()"
)
_lib.define("cuda_topk_merge(Tensor keys, Tensor(a!) values, Tensor(b!) indices) -> ()")
_ops = torch.ops.sae_kernels


def topk_encode(
    x: Tensor, W: Tensor, b: Tensor | None, k: int, activation: int, mask: Tensor | None, trims: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [N, d_in], W [d_sae, d_in], b [d_sae], mask [d_sae] bool -> values [N, k] in x's dtype, indices [N, k] int32.

    Checked arguments of one dtype, float32 or narrower. trims: int32 [1], counts the rows (per chunk of latents) of the
    slab path that brought more candidates than their buffer holds and were trimmed early; only a measure of speed.
    Workspace: at most SlabPlan.nbytes of products and 8 k bytes per row of them; where the fused kernel runs, a copy of
    W and 4 bytes per row; by panels 192 KiB per multiprocessor and 8 k bytes per row and strip, of as many rows as
    96 MiB hold.
    """
    values, indices = x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)
    choose(x, W, b, k, activation, mask, values, indices, trims=trims)
    return values, indices


def choose(
    x, W, b, k, activation, mask, values, indices,
    threshold: Tensor | None = None, passed: Tensor | None = None, count: Tensor | None = None,
    trims: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills values and indices [N, k]; with threshold [1] or [d_sae] float32, those of what is above it, and adds to
    passed [N] int32, of zeros, how many they are. count [1] int32, of the fused kernel alone: only so many rows, the
    first ones, are encoded.
    """
    if x.shape[0] == 0:
        return
    x, W = x.contiguous(), W.contiguous()
    bias = None if b is None else b.float().contiguous()
    limit = None if threshold is None else threshold.contiguous()
    layout = layout_of(x, W, k, activation, limit is not None) if mask is None else None
    if layout is not None:
        sample = layout.sample if limit is None else 0
        image = x.new_empty(layout.image_bytes, dtype=torch.uint8)
        where = (image, values, indices, activation, layout.groups, layout.stages, sample)
        guess = (None, None)
        if limit is None and pays_to_guess(x, activation, layout):
            guess = (x.new_empty(x.shape[0] + 1, dtype=torch.int32), x.new_empty(_GUESS_ROWS + 1, dtype=torch.float32))
        _ops.cuda_topk_encode_fused(x, W, bias, limit, passed, count, *guess, *where)
        return
    if count is not None:
        raise RuntimeError("sae_kernels: these tensors do not fit the fused encoder, which alone can be left out")
    bytes_mask = None if mask is None else mask.contiguous().view(torch.uint8)
    screen = (bias, bytes_mask, limit)
    if mask is None and limit is None and takes_panels(x, W, k, activation):
        _by_panels(x, W, bias, k, activation, values, indices)
    elif k > LARGEST_SELECT:
        _by_sorting(x, W, screen, passed, k, activation, values, indices)
    else:
        if trims is None and limit is None:
            trims = x.new_zeros(1, dtype=torch.int32)
        _by_slabs(x, W, screen, passed, k, activation, values, indices, trims)


class FusedLayout(NamedTuple):
    """groups: warpgroups of a block, 64 rows each; stages: chunks of 64 x 64 weights in shared memory; sample: tiles of
    64 latents that give the first bound; image_bytes: of the weights as they are to stand in shared memory.
    """

    groups: int
    stages: int
    sample: int
    image_bytes: int


def layout_of(x: Tensor, W: Tensor, k: int, activation: int = 0, limited: bool = False) -> FusedLayout | None:
    """Of the fused kernel for these; None: it does not take them. limited: by a threshold, which few latents reach."""
    gpu = _gpu_of(x.device)
    if x.data_ptr() % 4 > 0:
        return None
    return fused_layout(x.dtype, *W.shape[::-1], k, gpu.shared_bytes, gpu.hopper, limited, activation == _ABS)


_LINE_BYTES = 64 * 16 + 64 * 4  # biases and limits
_STAGE_BYTES = 64 * 64 * 2 + _LINE_BYTES + 16  # and barriers
_COMMON_BYTES = 1024 + 64 * 16 + 16  # to where tiles may begin, zeros, a signal
_LARGEST_DEPTH, _FEWEST_MORE, _MOST_STAGES = 256, 3, 16  # stages beside those of a tile
_MOST_COUNTED = 4094 * 64  # latents: a quarter of them is counted in 16 bits
_BUFFERS = {40: (3 * 32, 3), 128: (5 * 32, 2), 256: (9 * 32, 1)}  # largest k -> keys of a row, most groups


def fused_layout(
    dtype: torch.dtype,
    d_in: int,
    d_sae: int,
    k: int,
    shared_bytes: int,
    hopper: bool,
    limited: bool = False,
    magnitudes: bool = False,
) -> FusedLayout | None:
    """How the fused kernel lies in a block's shared memory; None: it does not take this shape, or does not fit."""
    largest_k = 256 if limited else 128
    if dtype not in (torch.bfloat16, torch.float16) or d_in % 2 or d_in > _LARGEST_DEPTH or k > largest_k:
        return None
    if limited and d_sae > _MOST_COUNTED:
        return None
    keys, most_groups = next(size for most, size in _BUFFERS.items() if k <= most)
    chunks = 1 << (-(-d_in // 64) - 1).bit_length()
    general = limited or magnitudes
    if hopper:  # kMostGroups
        most_groups = min(most_groups, 2 if general and chunks == 4 else 3)
    else:
        most_groups = min(most_groups, 1 if chunks == 4 or (general and (chunks == 2 or k > 40)) else 2)
    for groups in range(most_groups, 0, -1):
        stages = (shared_bytes - _COMMON_BYTES - groups * 64 * keys * 8) // _STAGE_BYTES
        if stages >= chunks + _FEWEST_MORE:
            tiles = 2 * -(-d_sae // 128)
            image_bytes = tiles * (chunks * 64 * 64 * 2 + _LINE_BYTES)
            share = tuning.short_plan(d_in, dtype.itemsize).share
            return FusedLayout(groups, min(stages, _MOST_STAGES), _sample(tiles, share, k), image_bytes)
    return None


_GUESS_ROWS, _FEWEST_ROUNDS = 1024, 8


def pays_to_guess(x: Tensor, activation: int, layout: FusedLayout) -> bool:
    """Whether first bounds come from a guess (topk_guess.cuh) rather than from layout.sample: that takes twice the time
    in which a processor encodes 64 rows.
    """
    at_once = layout.groups * 64 * _gpu_of(x.device).processors
    return activation != _ABS and max(_GUESS_ROWS, _FEWEST_ROUNDS * at_once) <= x.shape[0] < 2**31


def _sample(tiles: int, share: int, k: int) -> int:
    """An even number. 64 maxima over a share of the latents bound 1.4 k times as many, for k up to 32; else little."""
    if k > 64:
        return 0
    return 2 * -(-tiles // (2 * share)) if k <= 32 else min(16, tiles // 16 * 2)


class Gpu(NamedTuple):
    """shared_bytes: of a block; hopper: whether it multiplies by wgmma."""

    shared_bytes: int
    hopper: bool
    processors: int


@cache
def _gpu_of(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu(166_912, False, 2)  # for the tests that run the kernels on the CPU
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.shared_memory_per_block_optin, properties.major == 9, properties.multi_processor_count)


_PANEL_ROWS, _WIDE_LATENTS, _POOL_BYTES = 128, 256, 128 * 6 * 32 * 8  # of topk_panels.cuh
_PANEL_KEYS_BYTES, _LARGEST_MERGE = 96 * 2**20, 4096
_FEWEST_STRIP_TILES = 8


def takes_panels(x: Tensor, W: Tensor, k: int, activation: int) -> bool:
    """Whether the kernel of topk_panels.cuh can and should encode x by W: not where rows are too few to fill a GPU."""
    narrow = x.dtype in (torch.bfloat16, torch.float16) and x.shape[1] % 8 == 0
    gpu = _gpu_of(x.device)
    fits = gpu.hopper and narrow and k <= 128 and activation != _ABS
    aligned = x.data_ptr() % 16 == 0 and W.data_ptr() % 16 == 0
    if not (fits and aligned and tuning.long_plan(x.shape[1], x.element_size()).panels):
        return False
    return _panels(x.shape[0]) * _most_strips(-(-W.shape[0] // _WIDE_LATENTS), k) >= gpu.processors


def _panels(rows: int) -> int:
    return -(-rows // _PANEL_ROWS)


def _most_strips(tiles: int, k: int) -> int:
    return max(1, min(tiles // _FEWEST_STRIP_TILES, _LARGEST_MERGE // k))


def strips_of(rows: int, tiles: int, k: int, processors: int) -> int:
    """Tiles of a strip: as few strips as give each multiprocessor one, as each begins without a bound. More of them, so
    that L2 holds the rows that are taken at a time, win 2 % where rows are of 3 KiB and lose 10 % where they are of 8.
    """
    return -(-tiles // min(-(-processors // _panels(rows)), _most_strips(tiles, k)))


def _by_panels(x, W, bias, k, activation, values, indices) -> None:
    d_sae, processors = W.shape[0], _gpu_of(x.device).processors
    tiles = -(-d_sae // _WIDE_LATENTS)
    strip_tiles = strips_of(x.shape[0], tiles, k, processors)
    strips = -(-tiles // strip_tiles)
    lines = _lines(bias, d_sae, tiles * _WIDE_LATENTS, x, -torch.inf if activation == _NONE else 0.0)
    pool = x.new_empty(processors * _POOL_BYTES, dtype=torch.uint8)
    most = max(1, _PANEL_KEYS_BYTES // (strips * k * 8 * _PANEL_ROWS))  # panels
    rows = -(-_panels(x.shape[0]) // -(-_panels(x.shape[0]) // most)) * _PANEL_ROWS
    keys = x.new_empty(min(rows, x.shape[0]), strips, k, dtype=torch.int64)
    for top in range(0, x.shape[0], rows):
        here = slice(top, top + rows)
        part = x[here]
        found = keys[: part.shape[0]]
        _ops.cuda_topk_encode_panels(part, W, lines, pool, found, activation, strip_tiles)
        _ops.cuda_topk_merge(found, values[here], indices[here])


def _lines(bias: Tensor | None, d_sae: int, padded: int, x: Tensor, beyond: float) -> Tensor:
    """[padded, 8]: the bias, and seven zeros, as Line of tensor_core.cuh."""
    lines = x.new_zeros(padded, 8)
    lines[d_sae:, 0] = beyond
    if bias is not None:
        lines[:d_sae, 0] = bias
    return lines


def _by_slabs(x, W, screen, passed, k, activation, values, indices, trims) -> None:
    d_sae, (bias, mask, limit) = W.shape[0], screen
    nbytes = tuning.long_plan(x.shape[1], x.element_size()).nbytes
    rows, columns = tuning.slab_shape(x.shape[0], d_sae, nbytes)
    space = x.new_empty(rows * columns, dtype=torch.float32)
    keys = x.new_empty(rows if columns < d_sae else 0, k, dtype=torch.int64)
    for top in range(0, x.shape[0], rows):
        here = slice(top, top + rows)
        part, found = x[here], (keys, values[here], indices[here])
        for first in range(0, d_sae, columns):
            W_part = W[first : first + columns]
            slab = space[: part.shape[0] * W_part.shape[0]].view(part.shape[0], W_part.shape[0])
            product(part, W_part, slab)
            chunk = (first, first + columns >= d_sae, activation)
            if limit is None:
                _ops.cuda_topk_select(slab, bias, mask, *found, trims, *chunk)
            else:
                _ops.cuda_threshold_select(slab, bias, mask, limit, passed[here], *found, *chunk)


def _by_sorting(x, W, screen, passed, k, activation, values, indices) -> None:
    """Any k: torch.topk over the distinct keys of as many whole rows as the workspace holds."""
    d_sae = W.shape[0]
    nbytes = tuning.long_plan(x.shape[1], x.element_size()).nbytes
    rows = max(1, min(x.shape[0], tuning.whole(nbytes // (12 * d_sae))))
    space = x.new_empty(rows, d_sae, dtype=torch.float32)
    keys = x.new_empty(rows, d_sae, dtype=torch.int64)
    for top in range(0, x.shape[0], rows):
        here = slice(top, top + rows)
        part, counts = x[here], None if passed is None else passed[here]
        n = part.shape[0]
        product(part, W, space[:n])
        _ops.cuda_topk_write_keys(space[:n], *screen, counts, keys[:n], activation)
        best = keys[:n].topk(k, dim=1).values
        _ops.cuda_topk_write_codes(best, values[here], indices[here], activation)


def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, in descending order, equal ones by the lower column: torch.topk with ties settled.

    scores [N, d] float32 whose rows are contiguous, k from 1 to d and to LARGEST_SELECT -> values [N, k], indices
    [N, k] int32. Raises TypeError or ValueError for anything else.
    """
    if scores.dtype != torch.float32:
        raise TypeError(f"topk: scores must be float32, got {scores.dtype}")
    if scores.dim() != 2 or scores.stride(1) != 1:
        raise ValueError(f"topk: scores must be [N, d] with contiguous rows, got {tuple(scores.shape)}")
    if not 1 <= k <= min(scores.shape[1], LARGEST_SELECT):
        raise ValueError(f"topk: k must be between 1 and {min(scores.shape[1], LARGEST_SELECT)}, got {k}")
    values, indices = scores.new_empty(scores.shape[0], k), scores.new_empty(scores.shape[0], k, dtype=torch.int32)
    if scores.shape[0] > 0:
        none = scores.new_empty(0, k, dtype=torch.int64)
        trims = scores.new_zeros(1, dtype=torch.int32)
        _ops.cuda_topk_select(scores, None, None, none, values, indices, trims, 0, True, _NONE)
    return values, indices
