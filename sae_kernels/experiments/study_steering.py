"""The steering part of a study: latents beside a linear probe and a re-rank, each user towards what they turned to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import _plots
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
    liked_lists,
    linear_probes,
    over_represented,
    pareto_front,
    plots,
    probe_lists,
    rerank_lists,
)
from .stages import K, Parts

FEW, MANY = 10, 50  # latents of a concept: alike, and weighted
# what is chosen on other users, for every method that has a choice
NUMBERS = (50, 100, 200, 400)  # latents of a concept, weighted by the user, too
RIDGES = (1.0, 10.0, 100.0)  # of the probe
SHARPNESS = (0.25, 0.5, 1.0, 2.0)  # of the liked items
RERANK = "tag re-rank"  # at strength 0 the recommender as it is
LOSSES = (0.01, 0.02, 0.05, 0.1, 0.2)  # of personal nDCG, at which methods are compared
LOSS = 0.05
CHOOSING = 600  # users who choose, a third of the held-out ones at most


@dataclass(frozen=True)
class SteeringStudy:
    """table: every method and strength; base: the recommender as it is.

    choosing: method -> setting -> segment nDCG at LOSS, on `choosers` other users; a method has its best one in the
    table. left_out: users without a target that has a concept; all_seen: those of `users` who have seen every item of
    theirs: no figure of the segment counts them.
    """

    table: list[SteeringRow]
    base: SteeringRow
    choosing: dict[str, dict[str, float]]
    users: int
    choosers: int
    left_out: int
    all_seen: int

    @property
    def chosen(self) -> dict[str, str]:
        """method -> its setting: the best on the other users."""
        return _best(self.choosing)

    def gains(self) -> list[dict[str, str | float]]:
        """One row per method and loss: the segment nDCG there over the unsteered one, with its standard error."""
        points = {loss: at_loss(self.table, self.base.ndcg, loss) for loss in LOSSES}
        rows = []
        for method in dict.fromkeys(row.method for row in self.table):
            for loss, row in ((loss, found[method]) for loss, found in points.items() if method in found):
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

    def pages(self) -> list[tuple[str, str, Any]]:
        """(heading, note, figure), for `write_page`."""
        made = _plots.figure(300, yaxis_title="segment nDCG")
        for method, tried in self.choosing.items():
            made.add_scatter(x=list(tried), y=list(tried.values()), mode="lines+markers", name=method)
        note = f"At {LOSS:.0%} loss of personal nDCG, on {self.choosers:,} users who are in none of the other figures."
        return [*plots.pages(self.table, self.base.ndcg), ("What was chosen from", note, made)]

    def describe(self) -> str:
        """What was steered, and what every method gains at every loss."""
        lines = [
            f"steering {self.users:,} users; left out: {self.left_out:,} without a target that has a concept, "
            f"and from the segment's figures {self.all_seen:,} who have seen all of it",
            f"chosen on {self.choosers:,} others: "
            + "; ".join(f"{method} with {setting}" for method, setting in self.chosen.items()),
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

    The last held-out users choose the settings of the methods; the first `users` of the others are reported.
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
    popularity = parts.train.users_per_item()
    options = {"strengths": strengths, "embeddings": methods.full.head.items, "popularity": popularity}
    choosing = _choosing(methods, others, options)
    lists = methods.all(reported, _best(choosing))
    table = compare_steering(lists, reported.goals, reported.inputs, reported.targets, resamples=resamples, **options)
    return SteeringStudy(
        table, _unsteered(table), choosing, len(reported.inputs), 0 if others is reported else len(others.inputs),
        reported.left_out, reported.all_seen,
    )  # fmt: skip


def _choosing(methods: "_Methods", others: "_Group", options: dict[str, Any]) -> dict[str, dict[str, float]]:
    """method -> setting -> segment nDCG at LOSS, on these users."""
    settings = methods.settings(others)
    flat = {f"{name}: {setting}": lists for name, tried in settings.items() for setting, lists in tried.items()}
    lists = {**flat, RERANK: methods.rerank(others)}
    table = compare_steering(lists, others.goals, others.inputs, others.targets, resamples=0, **options)
    # with the error term on, each of them loses nothing at strength 0: all are there
    best = at_loss(table, _unsteered(table).ndcg, LOSS)
    return {
        name: {setting: best[f"{name}: {setting}"].segment_ndcg for setting in tried}
        for name, tried in settings.items()
    }


def _best(choosing: dict[str, dict[str, float]]) -> dict[str, str]:
    return {method: max(tried, key=tried.__getitem__) for method, tried in choosing.items()}


class _Group:
    """Held-out users with the concept each is steered towards."""

    def __init__(self, concepts: Concepts, parts: Parts, rows: Tensor) -> None:
        inputs, targets = parts.test.inputs.select(rows), parts.test.targets.select(rows)
        self.goals, kept = over_represented(concepts, inputs, targets)
        self.inputs: Histories = inputs.select(kept)
        self.targets: Histories = targets.select(kept)
        self.left_out = len(rows) - len(kept)
        self.all_seen = int((self.goals.unseen(self.inputs) == 0).sum())


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
        # at a position a latent correlates with the item that stands there, not with those that it leads to
        self.near_by = self.by if model.positions == "last" else "correlation"
        items, x = embedded
        kept = told[items]
        self.probed = x[kept], concepts.labels[items[kept]]

    def known(self, group: _Group) -> Goals:
        return replace(group.goals, labels=group.goals.labels & self.told.unsqueeze(1))

    def weights(self, m: int, by: str) -> tuple[list, list]:
        pairs = (self.found.weights(name, min(m, self.full.sae.d_sae), by) for name in self.names)
        latents, worth = zip(*pairs, strict=True)
        return list(latents), list(worth)

    def settings(self, group: _Group) -> dict[str, dict[str, Lists]]:
        """method -> setting -> lists, of the methods that have something to choose."""
        users, goals = self.full.encode(group.inputs), self.known(group)

        def near(to: str) -> dict[str, Lists]:
            pairs = {f"{m} latents": self.weights(m, self.near_by) for m in NUMBERS}
            return {
                name: latent_lists(self.full, users, goals, latents, K, worth, near=to)
                for name, (latents, worth) in pairs.items()
            }

        probes = {f"ridge {ridge:g}": linear_probes(*self.probed, ridge) for ridge in RIDGES}
        found = {
            "latents near the user": near("user"),
            "linear probe": {
                name: probe_lists(self.full, users, goals, directions, K) for name, directions in probes.items()
            },
        }
        if self.full.head.linear:
            found["latents near liked items"] = near("liked")
            found["liked items, no SAE"] = {
                f"sharpness {sharpness:g}": liked_lists(self.full, users, goals, K, sharpness=sharpness)
                for sharpness in SHARPNESS
            }
        return found

    def rerank(self, group: _Group) -> Lists:
        return rerank_lists(self.full, self.full.encode(group.inputs), self.known(group), K)

    def all(self, group: _Group, chosen: dict[str, str]) -> dict[str, Lists]:
        users, goals, settings = self.plain.encode(group.inputs), self.known(group), self.settings(group)
        few = [self.found.latents(name, FEW) for name in self.names]
        many, worth = self.weights(MANY, self.by)
        return {
            f"{FEW} latents by TF-IDF": latent_lists(self.plain, users, goals, few, K),
            f"{MANY} latents by {self.by}": latent_lists(self.plain, users, goals, many, K, worth),
            "the same, with error term": latent_lists(self.full, users, goals, many, K, worth),
            **{method: settings[method][setting] for method, setting in chosen.items()},
            RERANK: self.rerank(group),
        }


def _unsteered(table: Sequence[SteeringRow]) -> SteeringRow:
    return next(row for row in table if row.method == RERANK and row.strength == 0)
