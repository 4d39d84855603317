"""Figures of recommendation lists: accuracy, concept, diversity and novelty per user; coverage and Gini of them all."""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from ..data.histories import Histories
from .ranking import metrics_at_k
from .resample import resample_weights


def list_figures(
    top: Tensor,
    targets: Histories,
    wanted: Tensor,
    n_wanted: Tensor,
    popularity: Tensor,
    embeddings: Tensor | None = None,
) -> dict[str, Tensor]:
    """Per user, all [n_users] float64; NaN where a figure does not exist for a user.

    top [n_users, k] int64, -1 for no item; targets: the users' own held-out items; wanted [n_users, k] bool: what is
    listed belongs to the segment; n_wanted [n_users]: unseen items of the segment; popularity [n_items]: users who have
    the item; embeddings [n_items, d]: for diversity, absent without.

    ndcg, recall: against the targets; segment_ndcg, segment_recall: against all unseen items of the segment, dividing
    by min(k, n_wanted), NaN without one; concept_share: of the listed items; novelty: mean -log2 of an item's
    popularity over that of the most popular one (both plus one); diversity: mean of 1 - cosine over pairs of the list.
    """
    k, listed = top.shape[1], top >= 0
    personal = metrics_at_k(top, targets)
    hits, count = (wanted & listed).double(), listed.sum(1).double()
    gain = 1 / torch.arange(2, k + 2, dtype=torch.float64).log2()
    ideal = n_wanted.clamp(max=k)
    exists = ideal > 0
    share = (popularity.double() + 1) / (popularity.double().max() + 1)
    surprise = torch.where(listed, -share.log2()[top.clamp(min=0)], 0).sum(1)
    found = {
        "ndcg": personal[f"ndcg@{k}_per_user"],
        "recall": personal[f"recall@{k}_per_user"],
        "segment_ndcg": (hits @ gain / gain.cumsum(0)[ideal.clamp(min=1) - 1]).masked_fill(~exists, torch.nan),
        "segment_recall": (hits.sum(1) / ideal.clamp(min=1)).masked_fill(~exists, torch.nan),
        "concept_share": hits.sum(1) / count,
        "novelty": surprise / count,
    }
    if embeddings is not None:
        found["diversity"] = _diversity(top, listed, embeddings)
    return found


def means_and_errors(
    per_user: dict[str, Tensor], top: Tensor, n_items: int, resamples: int = 200, seed: int = 0
) -> tuple[dict[str, float], dict[str, float]]:
    """Means over the users who have the figure, with coverage and gini of the lists, and their standard errors.

    coverage: share of the n_items that stand in any list; gini: of how often each stands in one, 0 for all alike, 1 for
    always the same. Errors: standard deviation over bootstrap resamples of the users, the same for every call with one
    seed; of those resamples in which any user has the figure; NaN with fewer than two.
    """
    table = torch.stack(list(per_user.values()), 1)
    there = ~table.isnan()
    table = torch.where(there, table, 0)
    means = dict(zip(per_user, (table.sum(0) / there.sum(0)).tolist(), strict=True))
    exposure = torch.ones(1, len(top), dtype=torch.float64)
    means["coverage"], means["gini"] = (float(value) for value in _exposure(top, exposure, n_items))
    drawn = [
        torch.stack([*(weights @ table / (weights @ there.double())).unbind(1), *_exposure(top, weights, n_items)], 1)
        for weights in resample_weights(len(top), resamples, seed=seed)
    ]
    values = torch.cat([torch.empty(0, len(means), dtype=torch.float64), *drawn])
    return means, {name: _spread(column) for name, column in zip(means, values.unbind(1), strict=True)}


def _spread(values: Tensor) -> float:
    """Standard deviation of what is not NaN; NaN for fewer than two."""
    there = values[~values.isnan()]
    return float(there.std()) if len(there) > 1 else torch.nan


def _exposure(top: Tensor, weights: Tensor, n_items: int) -> tuple[Tensor, Tensor]:
    """Coverage and Gini of the lists with every user counted weights [b, n_users] times: both [b]."""
    counts = torch.zeros(len(weights), n_items + 1, dtype=torch.float64)
    counts.index_add_(1, (top % (n_items + 1)).reshape(-1), weights.repeat_interleave(top.shape[1], 1))
    counts = counts[:, :n_items].sort(1).values
    rank = 2 * torch.arange(1, n_items + 1, dtype=torch.float64) - n_items - 1
    return (counts > 0).double().mean(1), counts @ rank / (n_items * counts.sum(1))


def _diversity(top: Tensor, listed: Tensor, embeddings: Tensor) -> Tensor:
    """The pairs need not be formed: |sum of unit vectors|^2 holds all cosines. NaN for fewer than two items."""
    unit = normalize(embeddings.double(), dim=1)
    count = listed.sum(1).double()
    ends = torch.cat([listed.sum(1).new_zeros(1), listed.sum(1).cumsum(0)])
    total = embedding_bag(top[listed], unit, ends, mode="sum", include_last_offset=True).square().sum(1)
    # items without an embedding have no cosine, not even with themselves
    itself = (unit.square().sum(1)[top.clamp(min=0)] * listed).sum(1)
    return 1 - (total - itself) / (count * (count - 1))
