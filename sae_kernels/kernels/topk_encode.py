"""topk_encode in Triton: which path, and the two that go through slabs of pre-activations."""

import torch
import triton
from torch import Tensor

from . import tuning
from .product import product
from .topk_encode_fused import Screen, precision, topk_encode_fused
from .topk_select import Selection, write_codes, write_keys


def topk_encode(
    x: Tensor, W: Tensor, b: Tensor | None, k: int, activation: int, mask: Tensor | None, path: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x [N, d_in], W [d_sae, d_in], b [d_sae], mask [d_sae] bool -> values [N, k] in x's dtype, indices [N, k] int32.

    Checked arguments of one dtype, float32 or narrower. path: "fused", "slab", "sort", or "auto" by the shape;
    ValueError for "fused" with a mask or of few latents.
    Workspace: at most SlabPlan.nbytes of products, tuning.GROUP_BYTES of groups and the buffers of one chunk's rows.
    """
    if path == "fused" and (mask is not None or _few(W.shape[0], k)):
        raise ValueError(f"topk_encode: path 'fused' takes no mask and more than {W.shape[0]} latents for k = {k}")
    values = x.new_empty(x.shape[0], k)
    indices = x.new_empty(x.shape[0], k, dtype=torch.int32)
    if x.shape[0] > 0:
        chosen = pick(x.shape[1], W.shape[0], k, mask is not None, x.dtype) if path == "auto" else path
        if chosen == "fused":
            topk_encode_fused(x, W, b, k, activation, values, indices)
        else:
            {"slab": by_slabs, "sort": by_sorting}[chosen](x, W, b, k, activation, mask, values, indices)
    return values, indices


def pick(d_in: int, d_sae: int, k: int, masked: bool, dtype: torch.dtype) -> str:
    """Which path, by the weights; the number of rows plays no part. Reckoned, not yet measured."""
    if k > tuning.LARGEST_K:
        return "sort"
    if masked or d_in > tuning.slab_plan(dtype.itemsize).largest_fused or _few(d_sae, k):
        return "slab"
    # a full float32 product runs without tensor cores: it takes ten times what the slab costs, and cuBLAS does it best
    if dtype == torch.float32 and precision(dtype) == "ieee":
        return "slab"
    return "fused"


def _few(d_sae: int, k: int) -> bool:
    """Then a sample of the latents bounds nothing, and everything would pass the fused threshold."""
    return tuning.first_step(d_sae, k) == 1


def by_slabs(x, W, b, k, activation, mask, values, indices, screen: Screen | None = None) -> Tensor:
    """Returns how many rows were done over, on the device. screen(slab, row, latent, 1) may change a slab before
    the choice; it is told the slab's first row and latent.
    """
    d_sae = W.shape[0]
    rows, columns = tuning.slab_shape(x.shape[0], d_sae, tuning.slab_plan(x.element_size()).nbytes)
    space = x.new_empty(rows * columns, dtype=torch.float32)
    best = Selection(rows, k, activation, b, mask, x.device)
    for top in range(0, x.shape[0], rows):
        part = x[top : top + rows]
        best.restart()
        for first in range(0, d_sae, columns):
            W_part = W[first : first + columns]
            pre = space[: part.shape[0] * W_part.shape[0]].view(part.shape[0], W_part.shape[0])
            product(part, W_part, pre)
            if screen is not None:
                screen(pre, top, first, 1)
            best.slab(pre, first, aligned=d_sae % 16 == 0)
            last = first + columns >= d_sae
            best.rank(part.shape[0], *((values[top : top + rows], indices[top : top + rows]) if last else ()))
    return best.overflows


def by_sorting(x, W, b, k, activation, mask, values, indices, screen: Screen | None = None) -> None:
    """Any k: torch.topk over the distinct keys of as many whole rows as the workspace holds."""
    d_sae, P = W.shape[0], 1024
    nbytes = tuning.slab_plan(x.element_size()).nbytes
    rows = max(1, min(x.shape[0], tuning.whole(nbytes // (12 * d_sae))))
    space = x.new_empty(rows, d_sae, dtype=torch.float32)
    keys = x.new_empty(rows, d_sae, dtype=torch.int64)
    bias = None if b is None else b.contiguous()
    bytes_mask = None if mask is None else mask.contiguous().view(torch.uint8)
    for top in range(0, x.shape[0], rows):
        part = x[top : top + rows]
        n = part.shape[0]
        product(part, W, space[:n])
        if screen is not None:
            screen(space[:n], top, 0, 1)
        write_keys[(n, triton.cdiv(d_sae, P))](
            space, bias, bytes_mask, keys, n, d_sae,
            ACTIVATION=activation, HAS_BIAS=b is not None, HAS_MASK=mask is not None, P=P,
        )  # fmt: skip
        best = keys[:n].topk(k, dim=1).values
        write_codes[(triton.cdiv(n * k, P),)](
            best, values[top : top + n], indices[top : top + n], n * k, ACTIVATION=activation, P=P
        )
