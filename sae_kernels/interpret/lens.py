"""The logit lens: what a latent does to the scores of items, through a head that is linear in the item embeddings."""

import torch
from torch import Tensor

from ..ops import _checks
from ..ops.topk_encode import topk_encode


@torch.no_grad()
def logit_lens(W_dec: Tensor, items: Tensor, labels: Tensor) -> Tensor:
    """How far a latent lifts the items of a concept above the average item, [n_concepts, d_sae] float64.

    W_dec [d_sae, d]; items [n_items, d]: the head scores a state h as h @ items.T; labels [n_items, n_concepts] bool.
    A unit of latent f adds W_dec[f] . items[i] to the score of item i: the mean of that over the concept's items minus
    its mean over all, in standard deviations over all items. 0 where a latent moves all items alike, NaN for a concept
    without an item. Nothing of size d_sae x n_items exists: both moments are those of the item embeddings.
    """
    _check("logit_lens", W_dec, items)
    _checks.tensor("logit_lens", "labels", labels, 2)
    if labels.dtype != torch.bool:
        raise TypeError(f"logit_lens: labels must be bool, got {labels.dtype}")
    if labels.shape[0] != items.shape[0]:
        shapes = f"labels {tuple(labels.shape)} must have a row per item of items {tuple(items.shape)}"
        raise ValueError(f"logit_lens: {shapes}")
    W, E = W_dec.double(), items.double()
    centred = E - E.mean(0)
    covariance = centred.T @ centred / max(len(E), 1)
    spread = ((W @ covariance) * W).sum(1).clamp(min=0).sqrt()
    lift = (labels.double().T @ centred / labels.sum(0).double().unsqueeze(1)) @ W.T
    # what rounding leaves of a latent that moves all items alike
    floor = torch.finfo(torch.float64).eps * len(E) * W.norm(dim=1) * E.norm(dim=1).max() if len(E) else 0.0
    return torch.where(spread > floor, lift / spread.clamp(min=torch.finfo(torch.float64).tiny), lift * 0)


@torch.no_grad()
def lens_items(W_dec: Tensor, items: Tensor, n: int = 10) -> tuple[Tensor, Tensor]:
    """The n items whose scores each latent raises most: (amounts, items), both [d_sae, n], the largest first.

    Equal amounts go to the lower item. W_dec and items as in logit_lens, of one dtype; 1 <= n <= n_items.
    """
    _check("lens_items", W_dec, items)
    _checks.integer("lens_items", "n", n, 1, items.shape[0])
    amounts, which = topk_encode(W_dec, items, None, n, activation="none")
    return amounts, which.long()


def _check(op: str, W_dec: Tensor, items: Tensor) -> None:
    _checks.tensor(op, "W_dec", W_dec, 2)
    _checks.tensor(op, "items", items, 2)
    if W_dec.shape[1] != items.shape[1]:
        raise ValueError(f"{op}: W_dec {tuple(W_dec.shape)} and items {tuple(items.shape)} must end in one d")
