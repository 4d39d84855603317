"""What an edit does to recommendations: more of the concept, at what cost for the user."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.histories import Histories
from ..eval.ranking import Scorer, metrics_at_k, top_k_items
from ..hooks import attach
from .edits import Edit


@dataclass(frozen=True)
class SteeringRow:
    """One strength. concept_share: share of the listed items that have the concept. ndcg: against users' own targets.
    segment_ndcg: against all unseen items of the concept, over the users who have one. k: length of the lists."""

    strength: float
    concept_share: float
    ndcg: float
    segment_ndcg: float
    k: int


def attached(
    model: nn.Module, sae: nn.Module, name: str | None = None, **options: object
) -> Callable[[Edit | None], AbstractContextManager[nn.Module]]:
    """steered(edit): a context in which the model runs through the SAE with that edit; outside it, it is as before.

    name: the module to attach to, model.hook_point where None; options: those of `attach`, such as error_term=True.
    """
    where = getattr(model, "hook_point", None) if name is None else name
    if where is None:
        raise ValueError(f"attached: name must be given, {type(model).__name__} has no hook_point")

    @contextmanager
    def steered(edit: Edit | None) -> Iterator[nn.Module]:
        with attach(model, where, sae, edit=edit, **options):
            yield model

    return steered


def steering_table(
    steered: Callable[[Edit | None], AbstractContextManager[Scorer]],
    edit_at: Callable[[float], Edit],
    concept_items: Tensor | Sequence[int],
    histories: Histories,
    targets: Histories,
    *,
    strengths: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.5),
    k: int = 20,
    batch_size: int = 512,
) -> list[SteeringRow]:
    """One row per strength: lists of k unseen items for all users, steered towards one concept.

    steered: edit -> context that gives a scorer as rank_metrics takes it; `attached(model, sae)` makes one. edit_at:
    strength -> edit, such as lambda alpha: mix(latents, alpha). concept_items: bool [n_items], or the codes of the
    items that have the concept. histories are masked from the lists; targets: the same users. Scores exist for one
    batch at a time. Raises TypeError or ValueError that names the argument.
    """
    member = _members(concept_items, histories.n_items)
    rows = []
    for strength in strengths:
        with steered(edit_at(strength)) as scorer:
            top = top_k_items(scorer, histories, k, batch_size)
        listed = top >= 0
        share = (member[top.clamp(min=0)] & listed).sum() / listed.sum().clamp(min=1)
        ndcg = metrics_at_k(top, targets)[f"ndcg@{k}"]
        rows.append(SteeringRow(strength, float(share), ndcg, _segment_ndcg(top, member, histories, batch_size), k))
    return rows


def _segment_ndcg(top: Tensor, member: Tensor, histories: Histories, batch_size: int) -> float:
    total, users, items = 0.0, 0, member.nonzero().squeeze(1)
    for rows in torch.arange(len(histories)).split(batch_size):
        wanted = ~histories.batch(rows, torch.bool).cpu()[:, items]
        rows, wanted = rows[wanted.any(1)], wanted[wanted.any(1)]
        if rows.numel():
            who, which = wanted.nonzero(as_tuple=True)
            segment = Histories.from_pairs(who, items[which], rows.numel(), histories.n_items)
            total += float(metrics_at_k(top[rows], segment)[f"ndcg@{top.shape[1]}_per_user"].sum())
            users += rows.numel()
    return total / users if users else float("nan")


def _members(concept_items: Tensor | Sequence[int], n_items: int) -> Tensor:
    op, items = "steering_table: concept_items", torch.as_tensor(concept_items).cpu()
    if items.dtype == torch.bool:
        if items.shape != (n_items,):
            raise ValueError(f"{op} must be bool [n_items = {n_items}], got {tuple(items.shape)}")
    elif items.dim() != 1 or (items.numel() and items.is_floating_point()):
        raise TypeError(f"{op} must be bool or 1-d integers, got {items.dtype} {tuple(items.shape)}")
    elif items.numel() and not 0 <= int(items.min()) <= int(items.max()) < n_items:
        raise ValueError(f"{op} must be in [0, n_items = {n_items}), got {int(items.min())} to {int(items.max())}")
    else:
        items = torch.zeros(n_items, dtype=torch.bool).index_fill_(0, items.long(), True)
    if not bool(items.any()):
        raise ValueError(f"{op} names no item")
    return items
