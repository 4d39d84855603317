"""The steering part of a study: latents beside a linear probe and a re-rank, each user towards what they turned to."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import Concepts, Histories
from ..interpret import ConceptMap
from ..nn import TopKSAE
from ..steer import (
    Goals,
    Lists,
    SteeredRanker,
    SteeringRow,
    at_loss,
    compare_steering,
    latent_lists,
    linear_probes,
    over_represented,
    pareto_front,
    probe_lists,
    rerank_lists,
)
from .stages import K, Parts

FEW, MANY = 10, 50  # latents of a concept: alike, and weighted
NEAR = (50, 100, 200, 400)  # weighted by how near they are to the user: how many is chosen on other users
NEAREST = "latents near the user"
LOSSES = (0.01, 0.02, 0.05, 0.1, 0.2)  # of personal nDCG, at which methods are compared
LOSS = 0.05
CHOOSING = 600  # users on whom the number of latents is chosen, a third of the held-out ones at most


@dataclass(frozen=True)
class SteeringStudy:
    """table: every method and strength; base: the recommender as it is; near: the latents that were chosen.

    choosing: method -> segment nDCG at LOSS of the numbers of latents tried, on `choosers` other users. left_out: users
    without a target that has a concept.
    """

    table: list[SteeringRow]
    base: SteeringRow
    near: int
    choosing: dict[int, float]
    users: int
    choosers: int
    left_out: int

    def gains(self) -> list[dict[str, str | float]]:
        """One row per method and loss: the segment nDCG there over the unsteered one, with its standard error."""
        rows = []
        for loss in LOSSES:
            for method, row in at_loss(self.table, self.base.ndcg, loss).items():
                gain = row.segment_ndcg / self.base.segment_ndcg if self.base.segment_ndcg else float("nan")
                error = row.errors.get("segment_ndcg", float("nan"))
                figures = {"strength": row.strength, "ndcg": row.ndcg, "segment_ndcg": row.segment_ndcg}
                rows.append({"method": method, "loss": loss, "gain": gain, **figures, "segment_ndcg_error": error})
        return rows

    def rows(self) -> list[dict]:
        """The table flat, for a file; on_front: whether no measured point beats the row's."""
        front = {(row.method, row.strength) for row in pareto_front(self.table)}
        flat = []
        for row in self.table:
            figures = {name: value for name, value in vars(row).items() if name != "errors"}
            errors = {f"{name}_error": value for name, value in row.errors.items()}
            flat.append({**figures, **errors, "on_front": (row.method, row.strength) in front})
        return flat

    def describe(self) -> str:
        """What was steered, and what every method gains at every loss."""
        tried = ", ".join(f"{m}: {segment:.4f}" for m, segment in self.choosing.items())
        lines = [
            f"steering {self.users:,} users ({self.left_out:,} more have no target with a concept); "
            f"{self.near} latents near the user, chosen on {self.choosers:,} others (segment nDCG@{K} at {LOSS:.0%} loss: {tried})",
            f"without a SAE: nDCG@{K} {self.base.ndcg:.4f}, of the segment {self.base.segment_ndcg:.4f}; "
            "the segment's gain at a loss of nDCG of",
            f"{'':<28}" + "".join(f"{loss:>9.0%}" for loss in LOSSES),
        ]
        gains = self.gains()
        for method in dict.fromkeys(row["method"] for row in gains):
            by = {row["loss"]: row["gain"] for row in gains if row["method"] == method}
            lines.append(f"{method:<28}" + "".join(f"{by[loss]:>8.2f}x" if loss in by else " " * 9 for loss in LOSSES))
        return "\n".join(lines)


def study_steering(
    model: nn.Module,
    sae: TopKSAE,
    parts: Parts,
    found: ConceptMap,
    told: Tensor,
    embedded: tuple[Tensor, Tensor],
    *,
    users: int,
    strengths: Sequence[float],
    resamples: int,
) -> SteeringStudy:
    """told [n_items] bool: whose tags the methods know. embedded: (items [rows], x [rows, d]) for the probes.

    The last held-out users choose the number of latents near the user; the first `users` of the others are reported.
    """
    names = [name for name in found.names if found.latents(name, 1)]
    if not names:
        raise ValueError(f"no concept has a latent with {found.min_support} firings on it: nothing to steer by")
    concepts = Concepts(names, parts.data.concepts.labels[:, [parts.data.concepts.names.index(n) for n in names]])
    n = len(parts.test.inputs)
    choosers = min(CHOOSING, n // 3)
    reported = _Group(concepts, parts, torch.arange(min(users, n - choosers)))
    others = reported if choosers == 0 else _Group(concepts, parts, torch.arange(n - choosers, n))
    methods = _Methods(model, sae, found, told, embedded, concepts)
    popularity = torch.bincount(parts.train.flat, minlength=parts.data.n_items)
    options = {"strengths": strengths, "embeddings": methods.full.head.items, "popularity": popularity}
    numbers = sorted({min(m, sae.d_sae) for m in NEAR})
    tried = {str(m): methods.near(others, m) for m in numbers} | {"base": methods.rerank(others)}
    table = compare_steering(tried, others.goals, others.inputs, others.targets, resamples=0, **options)
    best = at_loss(table, _unsteered(table, "base").ndcg, LOSS)
    choosing = {m: best[str(m)].segment_ndcg for m in numbers if str(m) in best}
    near = max(choosing, key=choosing.__getitem__, default=numbers[0])
    table = compare_steering(
        methods.all(reported, near), reported.goals, reported.inputs, reported.targets, resamples=resamples, **options
    )
    return SteeringStudy(
        table, _unsteered(table, "tag re-rank"), near, choosing, len(reported.inputs),
        0 if others is reported else len(others.inputs), reported.left_out,
    )  # fmt: skip


class _Group:
    """Held-out users with the concept each is steered towards."""

    def __init__(self, concepts: Concepts, parts: Parts, rows: Tensor) -> None:
        inputs, targets = parts.test.inputs.select(rows), parts.test.targets.select(rows)
        self.goals, kept = over_represented(concepts, inputs, targets)
        self.inputs: Histories = inputs.select(kept)
        self.targets: Histories = targets.select(kept)
        self.left_out = len(rows) - len(kept)


class _Methods:
    """Every method knows the tags of the told items alone. At strength 0 those with an error term, the probe and the
    re-rank are the recommender without a SAE."""

    def __init__(
        self, model: nn.Module, sae: TopKSAE, found: ConceptMap, told: Tensor, embedded: tuple[Tensor, Tensor],
        concepts: Concepts,
    ) -> None:  # fmt: skip
        self.plain, self.full = SteeredRanker(model, sae), SteeredRanker(model, sae, error_term=True)
        self.found, self.told, self.names = found, told, concepts.names
        self.by = "correlation" if found.lens is None else "lens"
        items, x = embedded
        kept = told[items]
        self.probes = linear_probes(x[kept], concepts.labels[items[kept]], ridge=100.0)

    def weights(self, m: int) -> tuple[list, list]:
        pairs = (self.found.weights(name, m, self.by) for name in self.names)
        latents, worth = zip(*pairs, strict=True)
        return list(latents), list(worth)

    def near(self, group: _Group, m: int) -> Lists:
        latents, worth = self.weights(m)
        return latent_lists(self.full, self.full.encode(group.inputs), group.goals, latents, K, worth, near=True)

    def rerank(self, group: _Group) -> Lists:
        goals = group.goals
        known = Goals(goals.names, goals.labels & self.told.unsqueeze(1), goals.concept)
        return rerank_lists(self.full, self.full.encode(group.inputs), known, K)

    def all(self, group: _Group, near: int) -> dict[str, Lists]:
        users, goals = self.plain.encode(group.inputs), group.goals
        few = [self.found.latents(name, FEW) for name in self.names]
        many, worth = self.weights(MANY)
        return {
            f"{FEW} latents by TF-IDF": latent_lists(self.plain, users, goals, few, K),
            f"{MANY} latents by {self.by}": latent_lists(self.plain, users, goals, many, K, worth),
            "the same, with error term": latent_lists(self.full, users, goals, many, K, worth),
            NEAREST: self.near(group, near),
            "linear probe": probe_lists(self.full, users, goals, self.probes, K),
            "tag re-rank": self.rerank(group),
        }


def _unsteered(table: Sequence[SteeringRow], method: str) -> SteeringRow:
    return next(row for row in table if row.method == method and row.strength == 0)
