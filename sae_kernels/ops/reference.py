"""Plain torch oracles: the definition of right for every op."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for anything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scores(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """What latents are ranked by, and what they are worth, both [N, d_sae]."""
    acc = accumulator(x.dtype)
    pre = linear(x.to(acc), W_enc.to(acc), None if b_enc is None else b_enc.to(acc))
    score = {"relu": torch.relu, "abs": torch.abs, "none": lambda p: p}[activation](pre)
    return score, score if activation == "relu" else pre


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, activation: str = "relu", latent_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [N, d_in], W_enc [d_sae, d_in], b_enc [d_sae] -> values [N, k] in x's dtype, indices [N, k] int32."""
    score, value = _scores(x, W_enc, b_enc, activation)
    if latent_mask is not None:
        score, value = score.masked_fill(~latent_mask, -torch.inf), value.masked_fill(~latent_mask, 0)
    order = score.argsort(dim=-1, descending=True, stable=True)
    if latent_mask is not None:
        order = order.gather(-1, (~latent_mask[order]).to(torch.uint8).argsort(dim=-1, stable=True))
    indices = order[:, :k]
    return value.gather(-1, indices).to(x.dtype), indices.to(torch.int32)


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    max_active: int,
    activation: str = "relu",
    latent_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """threshold [1] or [d_sae] -> values [N, max_active] in the accumulator's dtype, indices and counts [N] int32."""
    score, value = _scores(x, W_enc, b_enc, activation)
    passes = (score > threshold.to(score.dtype)) | score.isnan()
    if latent_mask is not None:
        passes = passes & latent_mask
    indices = score.masked_fill(~passes, -torch.inf).argsort(dim=-1, descending=True, stable=True)[:, :max_active]
    values = value.masked_fill(~passes, 0).gather(-1, indices)
    return values, indices.to(torch.int32), passes.sum(-1, dtype=torch.int32)


def batch_keep(values: Tensor, counts: Tensor, total: int, magnitude: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of values [N, m], each row's counts[n] first being candidates in descending order, the `total` best of all rows.

    Equal ones stand by row, then by place. Returns values with 0 elsewhere, how many each row kept [N] int32, and the
    lowest score kept [], 0 where there is none. magnitude: the score is |value|.
    """
    candidate = torch.arange(values.shape[1], device=values.device) < counts.unsqueeze(-1)
    score = (values.abs() if magnitude else values).masked_fill(~candidate, -torch.inf).flatten()
    order = score.argsort(descending=True, stable=True)[:total]
    keep = torch.zeros_like(candidate).flatten().index_fill(0, order, True).view_as(candidate) & candidate
    found = keep.sum()
    padded = torch.cat([score.new_zeros(1), score[order]])  # place 0: none was found
    threshold = padded.index_select(0, found.reshape(1)).reshape(())
    return torch.where(keep, values, 0), keep.sum(-1, dtype=torch.int32), threshold


def batch_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    max_active: int,
    activation: str = "relu",
    latent_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values [N, max_active] in the accumulator's dtype, indices and counts [N] int32, and the batch's threshold []."""
    lowest = x.new_tensor([-torch.inf if activation == "none" else 0], dtype=accumulator(x.dtype))
    values, indices, counts = threshold_encode(x, W_enc, b_enc, lowest, max_active, activation, latent_mask)
    kept, counts, threshold = batch_keep(values, counts, k * x.shape[0], activation == "abs")
    return kept, indices, counts, threshold


def dense_codes(values: Tensor, indices: Tensor, d_sae: int) -> Tensor:
    """values [N, k], indices [N, k] -> [N, d_sae] in the dtype of values; repeated indices add up."""
    return values.new_zeros(values.shape[0], d_sae).scatter_add(1, indices.long(), values)


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """values [N, k], indices [N, k], W_dec [d_sae, d_out], b_dec [d_out] -> [N, d_out] in W_dec's dtype."""
    acc = accumulator(W_dec.dtype)
    y = dense_codes(values.to(acc), indices, W_dec.shape[0]) @ W_dec.to(acc)
    return (y if b_dec is None else y + b_dec.to(acc)).to(W_dec.dtype)


def sae_loss(
    x: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, prefixes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """x [N, d_out] -> errors [N, P] in the accumulator's dtype, residual of the last prefix [N, d_out] in x's dtype."""
    acc = accumulator(W_dec.dtype)
    wide = (values.to(acc), W_dec.to(acc), None if b_dec is None else b_dec.to(acc))
    off = torch.stack(
        [sparse_decode(wide[0][:, :end], indices[:, :end], *wide[1:]) - x.to(acc) for end in prefixes], dim=1
    )
    return off.square().sum(-1), off[:, -1].to(x.dtype)
