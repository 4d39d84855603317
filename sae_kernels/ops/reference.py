"""Plain torch oracles: the definition of right for every op."""

import torch
from torch import Tensor
from torch.nn.functional import linear


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for anything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, activation: str = "relu", latent_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [N, d_in], W_enc [d_sae, d_in], b_enc [d_sae] -> values [N, k] in x's dtype, indices [N, k] int32."""
    acc = accumulator(x.dtype)
    pre = linear(x.to(acc), W_enc.to(acc), None if b_enc is None else b_enc.to(acc))
    score = {"relu": torch.relu, "abs": torch.abs, "none": lambda p: p}[activation](pre)
    value = score if activation == "relu" else pre
    if latent_mask is not None:
        score, value = score.masked_fill(~latent_mask, -torch.inf), value.masked_fill(~latent_mask, 0)
    order = score.argsort(dim=-1, descending=True, stable=True)
    if latent_mask is not None:
        order = order.gather(-1, (~latent_mask[order]).to(torch.uint8).argsort(dim=-1, stable=True))
    indices = order[:, :k]
    return value.gather(-1, indices).to(x.dtype), indices.to(torch.int32)


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """values [N, k], indices [N, k], W_dec [d_sae, d_out], b_dec [d_out] -> [N, d_out] in W_dec's dtype."""
    acc = accumulator(W_dec.dtype)
    codes = torch.zeros(values.shape[0], W_dec.shape[0], dtype=acc, device=values.device)
    codes = codes.scatter_add(1, indices.long(), values.to(acc))
    y = codes @ W_dec.to(acc)
    return (y if b_dec is None else y + b_dec.to(acc)).to(W_dec.dtype)
