"""The SAE variants that the grid compares: ours with other normalisers, activations and losses, and the published."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ..nn import BatchTopKSAE, JumpReLUSAE, TopKSAE
from ..ops import sparse_decode
from . import stages
from .stages import Parts

Tick = Callable[[int], object]

# name -> what differs from the demo's SAE
OURS = {
    "topk": {},
    "topk-global": {"normalize": "global"},
    "topk-raw": {"normalize": "none"},
    "topk-abs": {"activation": "abs"},
    "batch-topk": {"kind": BatchTopKSAE},  # k on average over the rows
    "jumprelu": {"kind": JumpReLUSAE},
}
# name -> loss, and the space in which output and batch are compared
PUBLISHED = {
    "published-l2": ("l2", "mixed"),
    "published-cosine": ("cosine", "mixed"),
    "repaired-l2": ("l2", "standardized"),
    "repaired-cosine": ("cosine", "standardized"),
}
TRAINED = (*OURS, *PUBLISHED)
REFIT_SUFFIX = "-refit"  # of any of them: the same SAE, read with stages.REFIT steps towards the least-squares values
LR, BETAS, L1 = 3e-4, (0.9, 0.99), 3e-4  # of the published recipe


def trained_as(name: str) -> str:
    """The variant whose SAE a name's is."""
    return name.removesuffix(REFIT_SUFFIX)


def train_variant(name: str, model: nn.Module, parts: Parts, config: Any, tick: Tick) -> TopKSAE:
    """A trained SAE of config.width * d latents and config.k active ones, in eval mode; tick(steps) as they are done.

    Raises ValueError for a name that is not trained, and for the published recipe on a sequence model.
    """
    if name not in TRAINED:
        raise ValueError(f"variant must be one of {', '.join(TRAINED)}, got {name!r}")
    if name in PUBLISHED and model.positions == "last":
        raise ValueError(f"{name}: a recipe for collaborative autoencoders, not for sequences")
    if name not in PUBLISHED:
        sae = stages.new_sae(model, parts, config, **OURS[name])
        every = max(1, config.steps // 50)
        stages.train_sae(sae, model, parts, config, progress=False, log_every=every, log=_ticking(tick))
        return sae.eval()
    embeddings = torch.cat([x for x, _ in stages.embeddings(model, parts.train)])
    return train_published(embeddings, config.width * config.d, config.k, *PUBLISHED[name], config, tick)


def _ticking(tick: Tick) -> Callable[[dict[str, float]], None]:
    done = 0

    def log(row: dict[str, float]) -> None:
        nonlocal done
        tick(row["step"] - done)
        done = row["step"]

    return log


def train_published(x: Tensor, d_sae: int, k: int, loss: str, space: str, config: Any, tick: Tick) -> TopKSAE:
    """The published recipe on embeddings x [users, d]: TopK, L1 as well, no AuxK, rows of W_dec normed before the step.

    loss: "l2" or "cosine". space: "mixed" compares the output, brought back to the scale of x, with the standardised x,
    as the public code does since its helper standardises the caller's tensor in place; "standardized" compares both
    before that, which is the same recipe without the defect.
    """
    generator = torch.Generator().manual_seed(config.seed)
    sae = TopKSAE(
        x.shape[1], d_sae, k, normalize="standardize", aux_coef=0, tied_init=False, generator=generator
    ).train()
    nn.init.kaiming_uniform_(sae.W_dec, generator=generator)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, betas=BETAS)
    for _ in range(config.steps):
        sae.normalize_decoder_()
        batch = x[torch.randint(len(x), (min(stages.ROWS, len(x)),), generator=generator)]
        standard = sae.normalizer(batch)[0]
        code = sae.encode(batch)
        made = sparse_decode(code.values, code.indices, sae.W_dec, sae.b_dec)
        made = made * code.scale + code.offset if space == "mixed" else made
        error = (made - standard).square().mean() if loss == "l2" else (1 - cosine_similarity(made, standard)).mean()
        optimizer.zero_grad(set_to_none=True)
        (error + L1 * code.values.abs().sum(1).mean()).backward()
        sae.project_grad_()
        optimizer.step()
        tick(1)
    sae.normalize_decoder_()
    return sae.eval()
