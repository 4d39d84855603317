"""Profiles of users in latents: what sets the fans of popular items apart, and what a group has in common."""

import torch
from torch import Tensor

from ..data.histories import Histories
from ..nn import SparseCode
from ..ops import _checks
from ..ops.activation_stats import ActivationStats


def cohens_d(first: ActivationStats, second: ActivationStats) -> Tensor:
    """(mean of first - mean of second) / pooled standard deviation, per latent: [d_sae] float64.

    Over all rows, those in which a latent does not fire as 0. 0 where a latent is constant over both; the sign alone,
    as inf, where it is constant in each and differs. Raises ValueError for fewer than 2 rows on a side.
    """
    if first.d_sae != second.d_sae:
        raise ValueError(f"cohens_d: d_sae of the two differ: {first.d_sae} and {second.d_sae}")
    for name, stats in (("first", first), ("second", second)):
        if stats.rows < 2:
            raise ValueError(f"cohens_d: {name} has {stats.rows} rows, expected at least 2")
    (mean_1, off_1), (mean_2, off_2) = _moments(first), _moments(second)
    pooled = ((off_1 + off_2) / (first.rows + second.rows - 2)).sqrt()
    # means of one constant round differently where the numbers of rows do
    alike = (mean_1 - mean_2).abs() <= 1e-12 * mean_1.abs()
    return torch.where((mean_1 == mean_2) | ((pooled == 0) & alike), 0.0, (mean_1 - mean_2) / pooled)


def popularity_latents(code: SparseCode, histories: Histories, share: float = 0.2) -> Tensor:
    """Cohen's d of every latent between the users of the most and of the least popular items: [d_sae] float64.

    code [n_users, k]: of those histories. A user's popularity is the mean over the history of log(1 + users who have
    the item); share of the users stands on either side. Large and positive: a latent of the mainstream; suppress or
    scale it down to recommend more of the rest (PopSteer: Ahmadov et al. 2025).
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"popularity_latents: share must be in (0, 0.5], got {share}")
    if code.values.shape[0] != len(histories):
        raise ValueError(
            f"popularity_latents: code has {code.values.shape[0]} rows and histories {len(histories)} users"
        )
    side = int(share * len(histories))
    if side < 2:
        raise ValueError(
            f"popularity_latents: a share of {share} of {len(histories)} users is {side}; either side needs 2 at least"
        )
    order = user_popularity(histories).argsort(stable=True)
    popular, niche = ActivationStats(code.d_sae), ActivationStats(code.d_sae)
    for stats, rows in ((popular, order[len(order) - side :]), (niche, order[:side])):
        stats.update(code.values[rows].detach(), code.indices[rows])
    return cohens_d(popular, niche)


def user_popularity(histories: Histories) -> Tensor:
    """Mean over each history of log(1 + number of users who have the item): [n_users] float64; 0 for an empty one."""
    log_count = histories.users_per_item().double().log1p()
    total = torch.zeros(len(histories), dtype=torch.float64)
    total.index_add_(0, histories.row_ids(), log_count[histories.flat])
    return total / histories.lengths.clamp(min=1)


def group_code(code: SparseCode, how: str = "average", *, at_least: float = 1.0) -> SparseCode:
    """One code for several users: code [members, k] -> [1, the latents that stay], decodable as any other.

    how: "average" of the members' activations; "max"; or "common": the average of the latents that fire in at least
    this share of the members. The terms of the normaliser are averaged.
    """
    if how not in ("average", "max", "common"):
        raise ValueError(f"group_code: how must be 'average', 'max' or 'common', got {how!r}")
    _checks.tensor("group_code", "code.values", code.values, 2)
    members = code.values.shape[0]
    if members == 0:
        raise ValueError("group_code: the group has no member")
    if not 0 < at_least <= 1:
        raise ValueError(f"group_code: at_least must be in (0, 1], got {at_least}")
    fires = code.values != 0
    owner = torch.arange(members, device=fires.device).unsqueeze(1).expand_as(fires)[fires]
    # a latent may stand in several slots of a member: its activation there is their sum
    pairs, place = (owner * code.d_sae + code.indices[fires].long()).unique(return_inverse=True)
    amount = code.values.new_zeros(pairs.numel()).index_add_(0, place, code.values[fires])
    latents, place = (pairs % code.d_sae).unique(return_inverse=True)
    if how == "max":
        values = amount.new_zeros(latents.numel()).scatter_reduce_(0, place, amount, "amax", include_self=False)
        silent_in_some = torch.bincount(place, minlength=latents.numel()) < members
        values = torch.where(silent_in_some, values.clamp(min=0), values)
    else:
        values = amount.new_zeros(latents.numel()).index_add_(0, place, amount) / members
    if how == "common":
        kept = torch.bincount(place, minlength=latents.numel()) >= at_least * members - 1e-9
        latents, values = latents[kept], values[kept]
    offset, scale = (t if t is None or t.dim() < 2 else t.mean(0, keepdim=True) for t in (code.offset, code.scale))
    return SparseCode(values.unsqueeze(0), latents.to(code.indices).unsqueeze(0), code.d_sae, offset, scale)


def _moments(stats: ActivationStats) -> tuple[Tensor, Tensor]:
    """Mean over all rows and sum of squares about it, per latent."""
    mean = stats.sum / stats.rows
    off = (stats.sum_sq - stats.rows * mean.square()).clamp(min=0)
    # what rounding leaves of a constant latent
    return mean, torch.where(off > 1e-12 * stats.sum_sq, off, 0.0)
