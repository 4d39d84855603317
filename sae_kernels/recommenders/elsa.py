"""ELSA, a linear shallow autoencoder for collaborative filtering (Vancura et al. 2022): scores = x A A^T - x."""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, normalize

from ._bags import distinct, multi_hot, row_ids


class ELSAEncoder(nn.Module):
    """x [B, n_items], or bags (flat, offsets [B + 1]) -> user embeddings x A [B, d], rows of A of unit norm."""

    def __init__(self, n_items: int, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_items, d)))

    def items(self) -> Tensor:
        """A [n_items, d]: the unit-norm item embeddings."""
        return normalize(self.weight, dim=1)

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        n_items = self.weight.shape[0]
        if offsets is not None:
            if x.numel() < n_items:  # a few histories: the rows they need cost less than all
                rows = normalize(self.weight[x], dim=1)
                place = torch.arange(x.numel(), device=x.device)
                return embedding_bag(place, rows, offsets, mode="sum", include_last_offset=True)
            return embedding_bag(x, self.items(), offsets, mode="sum", include_last_offset=True)
        if x.dim() == 0 or x.shape[-1] != n_items:
            raise ValueError(f"ELSA: x {tuple(x.shape)} must end in n_items = {n_items}")
        return x @ self.items()


class ELSADecoder(nn.Module):
    """h [..., d] -> h A^T [..., n_items], with the A of the encoder."""

    def __init__(self, encoder: ELSAEncoder) -> None:
        super().__init__()
        # in a tuple the encoder is no submodule: the weight has one name in the state dict, and deepcopy keeps the tie
        self._encoder = (encoder,)

    def forward(self, h: Tensor) -> Tensor:
        return h @ self._encoder[0].items().T


class ELSA(nn.Module):
    """forward(x [B, n_items]) -> scores [B, n_items] = decoder(encoder(x)) - x.

    The user embedding is the output of the module "encoder". Without the "- x" an item of the history would score
    itself.
    """

    hook_point, positions, mask = "encoder", "all", None

    def __init__(self, n_items: int, d: int = 256) -> None:
        super().__init__()
        if n_items < 1 or d < 1:
            raise ValueError(f"ELSA: n_items and d must be at least 1, got {n_items} and {d}")
        self.n_items, self.d = n_items, d
        self.encoder = ELSAEncoder(n_items, d)
        self.decoder = ELSADecoder(self.encoder)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x)) - x

    def inputs(self, flat: Tensor, offsets: Tensor) -> Tensor:
        """Bags -> the rows [B, n_items] of zeros and ones that forward takes."""
        return multi_hot(flat, offsets, self.n_items, self.encoder.weight.dtype)

    def encode_histories(self, flat: Tensor, offsets: Tensor) -> Tensor:
        """Bags (flat [nnz], offsets [B + 1]) -> [B, d], as the encoder on multi-hot rows, which are not built: an item
        that stands twice counts once, and an empty history gives zeros."""
        return self.encoder(*distinct(flat, offsets, self.n_items))

    def score_histories(self, flat: Tensor, offsets: Tensor) -> Tensor:
        """Bags -> scores [B, n_items], as forward on their multi-hot rows."""
        flat, offsets = distinct(flat, offsets, self.n_items)
        scores = self.decoder(self.encoder(flat, offsets))
        return scores.index_put((row_ids(offsets), flat), scores.new_tensor(-1.0), accumulate=True)

    def item_head(self) -> tuple[None, Tensor, None]:
        """(query, items [n_items, d], bias): an embedding h scores query(h) @ items.T + bias; None: as it is, none."""
        return None, self.encoder.items(), None

    def training_loss(self, flat: Tensor, offsets: Tensor) -> Tensor:
        """Mean over the rows of |p / |p| - x / |x||^2 with p = relu(x A A^T - x). The items of a row must be distinct.

        An empty row counts nowhere. One buffer of rows x n_items is all that is held.
        """
        A = self.encoder.items()
        h = embedding_bag(flat, A, offsets, mode="sum", include_last_offset=True)
        return _NormalizedError.apply(h, A, flat, offsets)


class _NormalizedError(torch.autograd.Function):
    """h [B, d], A [n_items, d], bags -> the loss above, by |p / |p| - x / |x||^2 = 2 - 2 p . x / (|p| |x|)."""

    @staticmethod
    def forward(ctx, h: Tensor, A: Tensor, flat: Tensor, offsets: Tensor) -> Tensor:
        rows = row_ids(offsets)
        p = h @ A.T
        p[rows, flat] -= 1
        p.relu_()
        length = offsets.diff().to(h.dtype).sqrt()
        norm = torch.linalg.vector_norm(p, dim=1)
        scale = (norm * length).clamp_min(torch.finfo(h.dtype).tiny).reciprocal()
        cosine = torch.zeros_like(norm).index_add_(0, rows, p[rows, flat]) * scale
        filled = (length > 0).to(h.dtype)
        weight = filled / filled.sum().clamp_min(1)
        ctx.save_for_backward(h, A, flat, rows, p, norm, scale, cosine, weight)
        return ((2 - 2 * cosine) * weight).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        h, A, flat, rows, p, norm, scale, cosine, weight = ctx.saved_tensors
        weight = 2 * grad * weight
        passes = (p[rows, flat] > 0).to(p.dtype)
        # out of place: a second backward must find p as it was
        d_pre = p * (weight * cosine / norm.square().clamp_min(torch.finfo(p.dtype).tiny)).unsqueeze(1)
        d_pre[rows, flat] -= passes * (weight * scale)[rows]
        return d_pre @ A, d_pre.T @ h, None, None
