"""Lists calibrated to target shares of concepts: one steered list per concept, interleaved by D'Hondt."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.histories import Histories
from ..ops import _checks
from .edits import Latents, mix
from .serve import SteeredRanker, Users


def concept_shares(histories: Histories, labels: Tensor) -> Tensor:
    """How a user's history is spread over the concepts, [n_users, n_concepts] float64, rows sum to 1.

    labels [n_items, n_concepts] bool; an item of several concepts counts 1 in each. A row of zeros where no item of the
    history has a concept.
    """
    if labels.dtype != torch.bool or labels.dim() != 2 or labels.shape[0] != histories.n_items:
        came = f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"concept_shares: labels must be bool [n_items = {histories.n_items}, n_concepts], got {came}")
    counts = torch.zeros(len(histories), labels.shape[1], dtype=torch.float64)
    counts.index_add_(0, histories.row_ids(), labels[histories.flat].double())
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def dhondt(shares: Tensor, n: int) -> Tensor:
    """Which column each of n places goes to: [rows, n] int64, by D'Hondt's highest averages; ties to the lower column.

    shares [rows, columns] >= 0, each row with a positive one. Every prefix of the places is as proportional as it gets.
    What rounding alone tells apart is a tie.
    """
    if shares.dim() != 2 or not bool((shares >= 0).all()) or not bool((shares.sum(1) > 0).all()):
        raise ValueError("dhondt: shares must be [rows, columns], not negative, with a positive one in every row")
    seats, order = torch.zeros_like(shares), []
    for _ in range(n):
        quotient = shares / (seats + 1)
        columns = torch.arange(shares.shape[1])
        highest = quotient.amax(1, keepdim=True) * (1 - 8 * torch.finfo(quotient.dtype).eps)
        won = torch.where(quotient >= highest, columns, shares.shape[1]).amin(1)
        seats[torch.arange(len(shares)), won] += 1
        order.append(won)
    return torch.stack(order, 1) if order else torch.zeros(len(shares), 0, dtype=torch.int64)


def calibrated(
    ranker: SteeredRanker,
    users: Users,
    latents: Sequence[Latents],
    shares: Tensor,
    n: int = 20,
    *,
    alpha: float = 0.3,
    top: int | None = None,
) -> Tensor:
    """Lists [n_users, n] whose places go to the concepts in the target shares; -1 where nothing unseen is left.

    latents: those of every concept (`ConceptMap.latents`); shares [n_users, n_concepts] such as concept_shares gives: a
    row of zeros gets the unsteered list. Each concept's own list is steered by mix(latents, alpha); places are given
    out by D'Hondt, and each takes the best item of its concept's list that is not in the list yet (the idea is
    CALISSTA's). top: only a user's so many largest shares count, of equal ones the first.
    """
    if shares.shape != (len(users), len(latents)):
        expected = f"[{len(users)} users, {len(latents)} concepts]"
        raise ValueError(f"calibrated: shares must be {expected}, got {tuple(shares.shape)}")
    if top is not None:
        _checks.integer("calibrated", "top", top, 1, 2**31)
        largest = shares.argsort(dim=1, descending=True, stable=True)[:, :top]
        shares = torch.zeros_like(shares).scatter_(1, largest, shares.gather(1, largest))
    empty = [c for c, chosen in enumerate(latents) if not torch.as_tensor(chosen).numel() and bool(shares[:, c].any())]
    if empty:
        raise ValueError(f"calibrated: concept {empty[0]} has no latents, and users have a share of it")
    out = ranker.rank(users, n)[0]
    told = (shares.sum(1) > 0).nonzero().squeeze(1)
    if told.numel() == 0:
        return out
    order = dhondt(shares[told], n)
    # a concept's list is needed only by the users who have a place for it
    lists = torch.full((len(told), len(latents), n), -1)
    for concept, chosen in enumerate(latents):
        rows = (order == concept).any(1).nonzero().squeeze(1)
        if rows.numel():
            lists[rows, concept] = ranker.rank(users.select(told[rows]), n, mix(chosen, alpha))[0]
    out[told] = _interleaved(lists, order)
    return out


def _interleaved(lists: Tensor, order: Tensor) -> Tensor:
    """lists [rows, concepts, n], order [rows, n] -> [rows, n]: the first item of the place's list not taken before."""
    rows, n = torch.arange(len(order)), order.shape[1]
    out = torch.full_like(order, -1)
    for place in range(n):
        candidates = lists[rows, order[:, place]]
        taken = (candidates.unsqueeze(2) == out[:, :place].unsqueeze(1)).any(2) | (candidates < 0)
        first = torch.where(taken, n, torch.arange(n)).amin(1)
        found = candidates.gather(1, first.clamp(max=n - 1).unsqueeze(1)).squeeze(1)
        out[:, place] = torch.where(first < n, found, -1)
    return out
