"""The SAE variants that the grid compares: ours with other normalisers, activations and losses, and the published."""

import copy
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
TASK = "topk-task"  # "topk", then trained on for what it recommends
TASK_SHARE, TASK_LR, TASK_FVU = 0.1, 3e-4, 5.0  # of the steps; and the weight of FVU beside a cross-entropy in nats
# name -> loss, and the space in which output and batch are compared
PUBLISHED = {
    "published-l2": ("l2", "mixed"),
    "published-cosine": ("cosine", "mixed"),
    "repaired-l2": ("l2", "standardized"),
    "repaired-cosine": ("cosine", "standardized"),
}
VARIANTS = (*OURS, TASK, *PUBLISHED)
TASK_KEEP = (0.5, 0.9)  # the share of a history that is given
LR, BETAS, L1 = 3e-4, (0.9, 0.99), 3e-4  # of the published recipe


def train_variant(name: str, model: nn.Module, parts: Parts, config: Any, tick: Tick) -> TopKSAE:
    """A trained SAE of config.width * d latents and config.k active ones, in eval mode; tick(steps) as they are done.

    Raises ValueError for an unknown name, and for the published recipe on a sequence model, which it is not made for.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {name!r}")
    if name not in OURS and model.positions == "last":
        raise ValueError(f"{name}: a recipe for collaborative autoencoders, not for sequences")
    if name not in PUBLISHED:
        sae = stages.new_sae(model, parts, config, **OURS.get(name, {}))
        every = max(1, config.steps // 50)
        stages.train_sae(sae, model, parts, config, progress=False, log_every=every, log=_ticking(tick))
        if name == TASK:
            train_on_task(sae, model, parts, config)
        return sae.eval()
    embeddings = torch.cat([x for x, _ in stages.embeddings(model, parts.train)])
    return train_published(embeddings, config.width * config.d, config.k, *PUBLISHED[name], config, tick)


def train_on_task(sae: TopKSAE, model: nn.Module, parts: Parts, config: Any) -> float:
    """Trains a finished SAE on, in a collaborative autoencoder that stays as it is, for what it recommends.

    Of each history a part is hidden. The loss is the cross-entropy of the hidden items under the softmax of the scores
    through the SAE (at a temperature that is learnt, since a rank does not know one), plus the loss of the
    reconstruction: an SAE that is aware of predictions, as in Monosemanticity4Rec (2025), with the users' own items in
    place of the model's scores. Returns the last cross-entropy.
    """
    generator, temperature = torch.Generator().manual_seed(config.seed), nn.Parameter(torch.ones(()))
    steps = max(1, round(TASK_SHARE * config.steps))
    groups = [{"params": list(sae.parameters()), "lr": TASK_LR}, {"params": [temperature], "lr": 1e-2}]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    decode = copy.deepcopy(model).requires_grad_(False).decoder
    with sae.train().constrain(optimizer):
        for _ in range(steps):
            rows = torch.randint(len(parts.train), (stages.ROWS // 2,), generator=generator)
            seen = parts.train.sub_histories(rows, TASK_KEEP, generator)
            with torch.no_grad():
                x = model.encode_histories(*seen.bags())
            out = sae.loss(x)
            given = seen.batch()
            entropy = _hidden_entropy(decode(sae.decode(out.code)), given, parts.train.batch(rows) - given, temperature)
            optimizer.zero_grad(set_to_none=True)
            (entropy + TASK_FVU * out.loss).backward()
            optimizer.step()
            schedule.step()
    return float(entropy.detach())


def _hidden_entropy(scores: Tensor, given: Tensor, hidden: Tensor, temperature: Tensor) -> Tensor:
    """Mean over the rows of the mean of -log p over a row's hidden items, p the softmax over the items not given.

    scores, given and hidden (multi-hot) [B, n_items]. Scores count in units of their spread within a row.
    """
    scores = scores / scores.detach().std(1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    log_p = (temperature * scores).masked_fill(given > 0, -1e9).log_softmax(1)
    count = hidden.sum(1)
    return (-(hidden * log_p).sum(1) / count.clamp_min(1))[count > 0].mean()


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
