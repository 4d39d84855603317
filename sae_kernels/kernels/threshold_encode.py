"""threshold_encode in Triton: topk_encode's paths, where what does not pass is put at the floor."""

import torch
from torch import Tensor

from .topk_encode import by_slabs, by_sorting, pick
from .topk_encode_fused import topk_encode_fused
from .topk_select import ABS, NONE


def threshold_encode(
    x: Tensor, W: Tensor, b: Tensor | None, threshold: Tensor, max_active: int, activation: int, mask: Tensor | None,
    path: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x [N, d_in], W [d_sae, d_in], b [d_sae], threshold [1] or [d_sae] fp32, mask [d_sae] bool -> values
    [N, max_active] fp32, indices [N, max_active] int32, counts [N] int32.

    Checked arguments of one dtype, float32 or narrower; no threshold is NaN, nor below 0 under relu and abs. What does
    not pass ties at the floor, below all that passes, so it fills up by the lowest latent. path: as in topk_encode.
    Workspace: topk_encode's and a quarter of a slab.
    """
    values = x.new_empty(x.shape[0], max_active, dtype=torch.float32)
    indices = x.new_empty(x.shape[0], max_active, dtype=torch.int32)
    counts = x.new_zeros(x.shape[0], dtype=torch.int32)

    def screen(pre: Tensor, row: int, latent: int, step: int) -> None:
        latents = slice(latent, latent + step * pre.shape[1], step)
        if b is not None:
            pre += b[latents]
        limit = threshold if threshold.shape[0] == 1 else threshold[latents]
        fails = (pre.abs() if activation == ABS else pre) <= limit  # not so for NaN
        if mask is not None:
            fails |= ~mask[latents]
        pre.masked_fill_(fails, -torch.inf if activation == NONE else 0)
        counts[row : row + pre.shape[0]] += pre.shape[1] - fails.sum(1, dtype=torch.int32)

    if x.shape[0] > 0:
        if path == "auto":
            path = pick(x.shape[1], W.shape[0], max_active, mask is not None, x.dtype)
        if path == "fused":
            topk_encode_fused(x, W, b, max_active, activation, values, indices, screen, threshold.contiguous(), counts)
        else:
            run = by_slabs if path == "slab" else by_sorting
            run(x, W, None, max_active, activation, None, values, indices, screen)
    if activation == NONE:
        slots = torch.arange(max_active, device=x.device)
        values.masked_fill_(slots >= counts.unsqueeze(-1), 0)
    return values, indices, counts
