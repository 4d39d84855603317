"""Starting weights taken from data."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import sparse_decode, topk_encode
from .constrain import normalize_rows_

_ROWS_FOR_SCALE = 4096


def geometric_median(rows: Tensor, steps: int = 64) -> Tensor:
    """Weiszfeld's iteration on rows [N, d]."""
    centre = rows.mean(0)
    floor = torch.finfo(rows.dtype).eps * rows.abs().max().clamp(min=1)
    for _ in range(steps):
        pull = 1 / (rows - centre).norm(dim=-1).clamp(min=floor)
        centre = pull @ rows / pull.sum()
    return centre


def dictionary(rows: Tensor, d_sae: int, generator: torch.Generator | None) -> Tensor:
    """[d_sae, d_in] of unit norm: rows [N, d_in] drawn without replacement, random directions where they run out.

    Rows of zeros, and rows that are not finite, have no direction and are passed over.
    """
    norm = torch.linalg.vector_norm(rows, dim=-1)
    rows = rows[(norm > 0) & norm.isfinite()]
    order = torch.randperm(len(rows), generator=generator, device=None if generator is None else generator.device)
    drawn = rows[order[:d_sae].to(rows.device)]
    rest = torch.randn(d_sae - len(drawn), rows.shape[1], generator=generator, device=order.device)
    directions = torch.cat([drawn, rest.to(rows)])
    normalize_rows_(directions)
    return directions


def encoder_scale(rows: Tensor, W: Tensor, k: int, activation: str) -> Tensor:
    """[] s: with W_enc = s W, W_dec = W [d_sae, d_in] and no biases, rows [N, d_in] are reconstructed best by s.

    The directions of a row overlap: at s = 1 their sum overshoots it, many times where k is large.
    """
    rows = rows[:_ROWS_FOR_SCALE]
    values, indices = topk_encode(rows, W, rows.new_zeros(len(W)), k, activation=activation)
    y = sparse_decode(values, indices, W, None)
    energy = y.square().sum()
    return torch.where(energy > 0, (y * rows).sum() / torch.where(energy > 0, energy, 1), 1)
