"""threshold_encode: the selection of topk_encode, told the thresholds."""

import torch
from torch import Tensor

from .topk_encode import choose, layout_of

_NONE = 1


def threshold_encode(
    x: Tensor, W: Tensor, b: Tensor | None, threshold: Tensor, max_active: int, activation: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, d_in], W [d_sae, d_in], b [d_sae], threshold [1] or [d_sae] fp32, mask [d_sae] bool -> values
    [N, max_active] fp32, indices [N, max_active] int32, counts [N] int32.

    Checked arguments of one dtype, float32 or narrower; no threshold is NaN, nor below 0 under relu and abs. Workspace:
    topk_encode's.
    """
    values, indices, counts = _empty(x, max_active)
    choose(x, W, b, max_active, activation, mask, values, indices, threshold, counts)
    return _padded(values, counts, activation), indices, counts


def takes_twice(x: Tensor, W: Tensor, max_active: int, activation: int, mask: Tensor | None) -> bool:
    return x.shape[0] > 0 and mask is None and layout_of(x, W, max_active, activation, True) is not None


def threshold_encode_twice(
    x: Tensor, W: Tensor, b: Tensor | None, first: Tensor, then: Tensor, total: int, max_active: int, activation: int
) -> tuple[Tensor, Tensor, Tensor]:
    """threshold_encode at `first` [1]; where fewer than `total` slots are filled by that, at the lower `then` [1]: the
    GPU finds out by itself, and nothing is waited for. Arguments as takes_twice says.
    """
    x, W = x.contiguous(), W.contiguous()
    values, indices, counts = _empty(x, max_active)
    into = (max_active, activation, None, values, indices)
    choose(x, W, b, *into, first, counts)
    few = counts.clamp(max=max_active).sum() < total
    choose(x, W, b, *into, then, counts, (few & (first > then)).to(torch.int32) * x.shape[0])
    return _padded(values, counts, activation), indices, counts


def _empty(x: Tensor, max_active: int) -> tuple[Tensor, Tensor, Tensor]:
    values = x.new_empty(x.shape[0], max_active, dtype=torch.float32)
    return values, torch.empty_like(values, dtype=torch.int32), x.new_zeros(x.shape[0], dtype=torch.int32)


def _padded(values: Tensor, counts: Tensor, activation: int) -> Tensor:
    if activation == _NONE:  # what fills up has the lowest score, -inf
        slots = torch.arange(values.shape[1], device=values.device)
        values.masked_fill_(slots >= counts.unsqueeze(-1), 0)
    return values
