"""threshold_encode: the selection of topk_encode, told the thresholds."""

import torch
from torch import Tensor

from .topk_encode import choose

_NONE = 1


def threshold_encode(
    x: Tensor, W: Tensor, b: Tensor | None, threshold: Tensor, max_active: int, activation: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, d_in], W [d_sae, d_in], b [d_sae], threshold [1] or [d_sae] fp32, mask [d_sae] bool -> values
    [N, max_active] fp32, indices [N, max_active] int32, counts [N] int32.

    Checked arguments of one dtype, float32 or narrower; no threshold is NaN, nor below 0 under relu and abs. Workspace:
    topk_encode's.
    """
    values = x.new_empty(x.shape[0], max_active, dtype=torch.float32)
    indices = x.new_empty(x.shape[0], max_active, dtype=torch.int32)
    counts = x.new_zeros(x.shape[0], dtype=torch.int32)
    choose(x, W, b, max_active, activation, mask, values, indices, threshold, counts)
    if activation == _NONE:  # what fills up has the lowest score, -inf
        slots = torch.arange(max_active, device=x.device)
        values.masked_fill_(slots >= counts.unsqueeze(-1), 0)
    return values, indices, counts
