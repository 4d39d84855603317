"""How sure a score is: bootstrap intervals of AUC and correlation for chosen pairs of concept and latent."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..eval.resample import resample_weights
from ..ops import _checks


@dataclass(frozen=True)
class Intervals:
    """Percentile intervals, all [n_pairs] float64; NaN where a resample never has the concept on some rows only."""

    auc_low: Tensor
    auc_high: Tensor
    correlation_low: Tensor
    correlation_high: Tensor


def bootstrap_intervals(
    values: Tensor,
    indices: Tensor,
    labels: Tensor,
    pairs: Sequence[tuple[int, int]],
    *,
    resamples: int = 200,
    level: float = 0.95,
    groups: Tensor | None = None,
    seed: int = 0,
) -> Intervals:
    """The intervals of the given (concept, latent) pairs over resamples of the rows.

    values, indices [rows, k] and labels [rows, n_concepts] bool as concept_scores takes them. groups [rows] int64:
    what is drawn with replacement where rows belong together, such as the item at a position. The pairs are taken as
    given: an interval does not know that a latent was chosen as the best of many; compare with a random SAE for that.
    """
    op = "bootstrap_intervals"
    _checks.integer(op, "resamples", resamples, 2, 10**6)
    if not 0 < level < 1:
        raise ValueError(f"{op}: level must be between 0 and 1, got {level}")
    if groups is not None and groups.shape != values.shape[:1]:
        raise ValueError(f"{op}: groups must have one entry per row, {len(values)}, got {tuple(groups.shape)}")
    detectors = [_Detector(values, indices, labels[:, concept], latent) for concept, latent in pairs]
    parts = [
        torch.stack([detector.scores(weights) for detector in detectors])
        for weights in resample_weights(len(values), resamples, groups, seed)
        if detectors
    ]
    if not parts:
        return Intervals(*(torch.zeros(0, dtype=torch.float64) for _ in range(4)))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(parts, -1).nanquantile(ends, dim=-1)
    return Intervals(low[:, 0], high[:, 0], low[:, 1], high[:, 1])


class _Detector:
    """One latent against one concept, sorted once; scores(weights [b, rows]) -> AUC and correlation [2, b]."""

    def __init__(self, values: Tensor, indices: Tensor, label: Tensor, latent: int) -> None:
        hits = (indices == latent) & (values != 0)
        rows, slot = hits.nonzero(as_tuple=True)
        value = values[rows, slot].double().cpu()
        # the rows in which the latent does not fire are one more entry, at 0
        levels, group = torch.cat([value, value.new_zeros(1)]).unique(return_inverse=True)
        self.rows, self.label = rows.cpu(), label.cpu()
        self.group, self.n_levels = group, levels.numel()
        centre = value.sum() / max(len(values), 1)
        self.off = torch.cat([value, value.new_zeros(1)]) - centre

    def scores(self, weights: Tensor) -> Tensor:
        total, with_it = weights.sum(1), weights[:, self.label].sum(1)
        here = weights[:, self.rows]
        positive = here * self.label[self.rows]
        rest = torch.stack([total - here.sum(1), with_it - positive.sum(1)])
        entries = torch.cat([here, rest[0].unsqueeze(1)], 1)
        positive = torch.cat([positive, rest[1].unsqueeze(1)], 1)
        levels = [weights.new_zeros(len(weights), self.n_levels) for _ in range(2)]
        for level, amount in zip(levels, (positive, entries - positive), strict=True):
            level.index_add_(1, self.group, amount)
        wins = (levels[0] * (levels[1].cumsum(1) - levels[1] / 2)).sum(1)
        auc = wins / (with_it * (total - with_it))
        mean, share = entries @ self.off / total, with_it / total
        covariance = positive @ self.off / total - mean * share
        variance = (entries @ self.off.square() / total - mean.square()).clamp(min=0)
        norm = (variance * share * (1 - share)).sqrt()
        correlation = torch.where(norm > 0, covariance / norm, 0.0)
        return torch.stack([auc, correlation.masked_fill(auc.isnan(), torch.nan)])
