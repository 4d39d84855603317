"""Ranking metrics of a recommender on held-out targets: nDCG@k, Recall@k, hit rate; never users x items at once."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .._modules import evaluating
from ..data.histories import Histories

Scorer = nn.Module | Callable[[Tensor], Tensor]


def rank_metrics(
    scorer: Scorer, histories: Histories, targets: Histories, k: int = 20, batch_size: int = 512
) -> dict[str, float | Tensor]:
    """Ranks all items but the seen ones for every user and compares the first k with the user's targets.

    scorer: a recommender of sae_kernels.recommenders; any module that maps multi-hot rows [B, n_items] to scores
    [B, n_items]; or a function of row numbers [B] int64 that returns the scores of those users. A module is run in eval
    mode, without gradients. histories: what was seen, masked from the ranking; targets: the same users, one target or
    more each (a target that is also in the history can not be found, and counts as missed).

    Returns "ndcg@k", "recall@k", "hr@k": means over the users; and the same with "_per_user": float64 [n_users]. nDCG
    is binary, its ideal over min(k, targets); Recall divides by min(k, targets). Equal scores rank the lower item
    first. Raises ValueError where k > n_items, a user has no target, the two differ in users or items, or a score is
    NaN.
    """
    _check(histories, targets, k, batch_size)
    return metrics_at_k(top_k_items(scorer, histories, k, batch_size), targets)


def metrics_at_k(top: Tensor, targets: Histories) -> dict[str, float | Tensor]:
    """The metrics of rank_metrics for lists made before: top [n_users, k] int64, best first, -1 for no item."""
    if top.shape[0] != len(targets):
        raise ValueError(f"metrics_at_k: top has {top.shape[0]} users and targets {len(targets)}")
    _check_targets(targets)
    k = top.shape[1]
    wanted = (targets.row_ids() * targets.n_items + targets.flat).unique()
    listed = torch.arange(len(targets)).unsqueeze(1) * targets.n_items + top
    hits = (torch.isin(listed, wanted) & (top >= 0)).double()
    # a target that stands twice in a row is one target
    n_targets = torch.bincount(wanted // targets.n_items, minlength=len(targets)).clamp(max=k)
    gain = 1 / torch.arange(2, k + 2, dtype=torch.float64).log2()
    per_user = {
        f"ndcg@{k}": hits @ gain / gain.cumsum(0)[n_targets - 1],
        f"recall@{k}": hits.sum(1) / n_targets,
        f"hr@{k}": (hits.sum(1) > 0).double(),
    }
    means = {name: float(values.mean()) for name, values in per_user.items()}
    return {**means, **{f"{name}_per_user": values for name, values in per_user.items()}}


def top_k_items(scorer: Scorer, histories: Histories, k: int = 20, batch_size: int = 512) -> Tensor:
    """The k best unseen items of every user: [n_users, k] int64, best first, -1 where fewer are unseen."""
    _check_k(histories, k, batch_size)
    top = torch.empty(len(histories), k, dtype=torch.int64)
    for rows, scores in score_batches(scorer, histories, batch_size):
        seen = histories.select(rows).to(scores.device)
        scores = scores.clone() if scores.is_floating_point() else scores.double()
        # what the scorer itself leaves out still stands before what the user has
        scores.clamp_(min=torch.finfo(scores.dtype).min)
        scores[seen.row_ids(), seen.flat] = -torch.inf
        top[rows] = top_k(scores, k).cpu()
        available = histories.n_items - histories.batch(rows, torch.bool).sum(1)
        top[rows] = top[rows].masked_fill(torch.arange(k) >= available.unsqueeze(1), -1)
    return top


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices [B, k] of the k largest of each row, in descending order, equal scores by the lower index first."""
    values, indices = scores.topk(k, dim=1, sorted=False)
    by_index = indices.argsort(dim=1)
    values, indices = values.gather(1, by_index), indices.gather(1, by_index)
    indices = indices.gather(1, values.argsort(dim=1, descending=True, stable=True))
    # topk takes any of the items that tie with the last place: those rows are sorted in full
    last = values.amin(1, keepdim=True)
    tied = ((scores == last).sum(1) > (values == last).sum(1)).nonzero().squeeze(1)
    if tied.numel():
        indices[tied] = scores[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    return indices


def sampled_rank_metrics(
    scorer: Scorer,
    histories: Histories,
    targets: Histories,
    *,
    k: int = 10,
    negatives: int = 100,
    seed: int = 0,
    batch_size: int = 512,
) -> dict[str, float | Tensor]:
    """nDCG@k and hit rate of one target per user among itself and `negatives` random items the user never had.

    The protocol of the SASRec paper (Kang & McAuley 2018); negatives are drawn with replacement. Returns "ndcg@k",
    "hr@k" and both "_per_user". Equal scores count half a place each. Raises ValueError where a user has not exactly
    one target.
    """
    _check(histories, targets, k, batch_size)
    if bool((targets.lengths != 1).any()):
        row = int((targets.lengths != 1).nonzero()[0])
        raise ValueError(f"sampled_rank_metrics: user row {row} has {int(targets.lengths[row])} targets, expected 1")
    if negatives < 1:
        raise ValueError(f"sampled_rank_metrics: negatives must be at least 1, got {negatives}")
    generator = torch.Generator().manual_seed(seed)
    place = torch.empty(len(histories), dtype=torch.float64)
    for rows, scores in score_batches(scorer, histories, batch_size):
        target = targets.flat[rows].unsqueeze(1)
        had = histories.batch(rows, torch.bool).scatter_(1, target, True)
        if bool(had.all(1).any()):
            row = int(rows[had.all(1)][0])
            raise ValueError(f"sampled_rank_metrics: user row {row} has every item: no negative is left")
        drawn = (~had).float().multinomial(negatives, replacement=True, generator=generator)
        goal, others = scores.gather(1, target.to(scores.device)), scores.gather(1, drawn.to(scores.device))
        place[rows] = ((others > goal).double() + (others == goal).double() / 2).sum(1).cpu()
    hit = (place < k).double()
    per_user = {f"ndcg@{k}": hit / (place + 2).log2(), f"hr@{k}": hit}
    means = {name: float(values.mean()) for name, values in per_user.items()}
    return {**means, **{f"{name}_per_user": values for name, values in per_user.items()}}


def score_batches(scorer: Scorer, histories: Histories, batch_size: int = 512) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows [B], scores [B, n_items]) for all users in order; scores on the scorer's device. NaN raises ValueError."""
    score = _score_function(scorer, histories)
    with evaluating(scorer):
        for rows in torch.arange(len(histories)).split(batch_size):
            with torch.no_grad():
                scores = score(rows)
            if scores.shape != (rows.numel(), histories.n_items):
                raise ValueError(f"scores must be {(rows.numel(), histories.n_items)}, got {tuple(scores.shape)}")
            bad = scores.isnan().any(1)
            if bool(bad.any()):
                raise ValueError(f"scores of user row {int(rows[bad.cpu()][0])} contain NaN")
            yield rows, scores


def _score_function(scorer: Scorer, histories: Histories) -> Callable[[Tensor], Tensor]:
    if not isinstance(scorer, nn.Module):
        return scorer
    n_items = getattr(scorer, "n_items", histories.n_items)
    if n_items != histories.n_items:
        raise ValueError(f"the model knows {n_items} items and the histories have {histories.n_items}")
    weight = next(scorer.parameters(), torch.empty(0))
    device, dtype = weight.device, weight.dtype if weight.is_floating_point() else torch.float32
    if hasattr(scorer, "score_histories"):
        return lambda rows: scorer.score_histories(*(t.to(device) for t in histories.bags(rows)))
    return lambda rows: scorer(histories.batch(rows, dtype).to(device))


def _check_k(histories: Histories, k: int, batch_size: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= histories.n_items:
        raise ValueError(f"rank_metrics: k must be between 1 and n_items = {histories.n_items}, got {k}")
    if batch_size < 1:
        raise ValueError(f"rank_metrics: batch_size must be at least 1, got {batch_size}")


def _check(histories: Histories, targets: Histories, k: int, batch_size: int) -> None:
    _check_k(histories, k, batch_size)
    if len(histories) != len(targets) or histories.n_items != targets.n_items:
        raise ValueError(
            f"rank_metrics: histories ({len(histories)} users, {histories.n_items} items) and targets "
            f"({len(targets)} users, {targets.n_items} items) must be of the same users and items"
        )
    _check_targets(targets)


def _check_targets(targets: Histories) -> None:
    if len(targets) == 0:
        raise ValueError("rank_metrics: there are no users")
    empty = targets.lengths == 0
    if bool(empty.any()):
        raise ValueError(f"rank_metrics: user row {int(empty.nonzero()[0])} has no target")
