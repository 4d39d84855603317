"""Three ways to read an item off a latent, each beside raw dimensions and an untrained SAE read the same way."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.histories import Histories
from ..data.interactions import Concepts
from ..nn import SparseCode, TopKSAE
from .concept_map import checked_items, encoded, supported, untrained
from .concepts import concept_scores
from .detectors import DetectorScores, audience_tiles, detector_scores, lens_tiles

DETECTORS = ("latents", "raw dimensions", "untrained SAE")
Scored = tuple[DetectorScores, Tensor]  # and which columns can be chosen for which concepts, bool


@dataclass(frozen=True)
class Reading:
    """The best detector of every concept in one reading; all [n_concepts], in the order of `names`.

    reading: "activation" (of the item as a history of one, or at its positions), "lens" (what a unit of the latent adds
    to the item's score) or "audience" (mean activation of the users who have the item). detector: one of DETECTORS.
    latent int64: the best by AUC. auc, correlation float64: of the best by each, over all items; the best of many is
    too good by luck. auc_held_out, correlation_held_out: chosen on one half of the items and scored on the other, mean
    of both ways round. A raw dimension may point either way, a latent only its own. NaN where a half lacks the concept
    or, in "activation", has no latent to choose.
    """

    reading: str
    detector: str
    names: list[str]
    latent: Tensor
    auc: Tensor
    correlation: Tensor
    auc_held_out: Tensor
    correlation_held_out: Tensor


@torch.no_grad()
def concept_readings(
    x: Tensor,
    sae: TopKSAE,
    concepts: Concepts,
    *,
    items: Tensor | None = None,
    head: Tensor | None = None,
    users: tuple[Tensor, Histories] | None = None,
    min_support: int = 5,
    seed: int = 0,
) -> list[Reading]:
    """The readings that the arguments allow, DETECTORS of each; x, concepts, items, head as concept_map takes them.

    head: for "lens"; raw dimension j is there the direction e_j over the very same item embeddings. users: the
    embeddings [n_users, d_in] and histories of users, for "audience", over the items that any of them has; raw
    dimensions are there those of the normalised embeddings. All read the items of x alone, and hold the same half of
    them out. In "activation" a latent can be chosen from min_support firings on the concept on, as in concept_map.
    """
    items = checked_items("concept_readings", x, sae, concepts, items)
    _, names, _ = supported("concept_readings", concepts, items, min_support)
    labels = concepts.labels[:, torch.tensor([concepts.names.index(name) for name in names])]
    known = items.unique()
    half = _half(known, len(labels), seed)
    saes = {DETECTORS[0]: sae, DETECTORS[2]: untrained(sae, seed)}

    readings = []
    rows = (labels[items], half[items])
    for detector in DETECTORS:
        code = None if detector not in saes else encoded(saes[detector], x)
        score = (lambda kept, y: _every(detector_scores([x[kept]], y))) if code is None else _fired(code, min_support)
        readings.append(_reading("activation", detector, names, score, *rows))

    def dense(reading: str, detector: str, tiles: Callable[[], Iterable[Tensor]], which: Tensor) -> None:
        def score(kept: Tensor, y: Tensor) -> Scored:
            return _every(detector_scores((tile[which[kept]] for tile in tiles()), y))

        readings.append(_reading(reading, detector, names, score, labels[which], half[which]))

    if head is not None:
        for detector in DETECTORS:
            directions = saes[detector].W_dec if detector in saes else torch.eye(head.shape[1]).to(head)
            dense("lens", detector, lambda directions=directions: lens_tiles(directions, head), known)
    if users is not None:
        embeddings, histories = users
        had = known[torch.bincount(histories.flat, minlength=len(labels))[known] > 0]
        for detector in DETECTORS:
            if detector in saes:
                columns = SparseCode(*encoded(saes[detector], embeddings), sae.d_sae)
            else:
                columns = sae.normalizer(embeddings)[0]
            dense("audience", detector, lambda columns=columns: audience_tiles(columns, histories), had)
    return readings


def readings_table(readings: list[Reading]) -> list[dict[str, str | int | float]]:
    """One row per reading and detector: means over the concepts that have the figure, and how they compare.

    concepts, concepts_held_out: how many have one over all items, and in both halves, where support is rarer.
    auc_gain, correlation_gain (and the same held out): the row's mean above chance over that of the raw dimensions in
    the same reading, of the concepts that both have. above_untrained: share of the concepts whose AUC is above the
    untrained SAE's; the same for correlation_above_untrained. NaN for nothing to compare.
    """
    by = {(one.reading, one.detector): one for one in readings}
    rows = []
    for one in readings:
        raw, blank = by[one.reading, DETECTORS[1]], by[one.reading, DETECTORS[2]]
        row: dict[str, str | int | float] = {"reading": one.reading, "detector": one.detector}
        row["concepts"], row["concepts_held_out"] = (
            int((~score.isnan()).sum()) for score in (one.auc, one.auc_held_out)
        )
        for name, chance in (("auc", 0.5), ("correlation", 0.0)):
            for figure in (name, f"{name}_held_out"):
                row[figure] = float(getattr(one, figure).nanmean())
                row[f"{figure}_gain"] = _gain(getattr(one, figure), getattr(raw, figure), chance)
            mine, theirs = getattr(one, name), getattr(blank, name)
            there = ~(mine.isnan() | theirs.isnan())
            row[f"{name}_above_untrained"] = float((mine > theirs)[there].double().mean())
        rows.append(row)
    return rows


def _gain(mine: Tensor, theirs: Tensor, chance: float) -> float:
    there = ~(mine.isnan() | theirs.isnan())
    gain, raw = (float(figure[there].mean()) - chance for figure in (mine, theirs))
    return gain / raw if raw else float("nan")


def _half(items: Tensor, n_items: int, seed: int) -> Tensor:
    """[n_items] bool: one half of these items, drawn from them alone, however they were drawn themselves."""
    drawn = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[: len(items) // 2]
    return torch.zeros(n_items, dtype=torch.bool).index_fill_(0, items[drawn], True)


def _every(found: DetectorScores) -> Scored:
    return found, torch.ones_like(found.auc, dtype=torch.bool)


def _fired(code: tuple[Tensor, Tensor], min_support: int) -> Callable[[Tensor, Tensor], Scored]:
    values, indices = code

    def score(kept: Tensor, y: Tensor) -> Scored:
        found = concept_scores(values[kept], indices[kept], int(indices.max()) + 1, y)
        return DetectorScores(found.auc, found.correlation), found.together >= min_support

    return score


def _reading(
    reading: str,
    detector: str,
    names: list[str],
    score: Callable[[Tensor, Tensor], Scored],
    labels: Tensor,
    half: Tensor,
) -> Reading:
    """score(rows bool, labels of those rows) -> what the columns score on them."""
    parts = [score(rows, labels[rows]) for rows in (torch.ones_like(half), half, ~half)]
    either_way = detector == DETECTORS[1]
    found, latents = {}, {}
    for name, chance in (("auc", 0.5), ("correlation", 0.0)):
        _, one, other = (getattr(part, name) - chance for part, _ in parts)
        # support is asked for where a column is chosen, not where it is scored: there it would drop the worst
        whole, from_one, from_other = (
            (getattr(part, name) - chance).masked_fill(~eligible, torch.nan) for part, eligible in parts
        )
        latent, best = _best(whole, either_way)
        found[name], latents[name] = best + chance, latent
        both = [_transferred(from_one, other, either_way), _transferred(from_other, one, either_way)]
        found[f"{name}_held_out"] = torch.stack(both).mean(0) + chance
    return Reading(reading, detector, names, latents["auc"], **found)


def _best(score: Tensor, either_way: bool) -> tuple[Tensor, Tensor]:
    """score [n_concepts, m] above chance -> the best column of every concept and its score, NaN where none has one."""
    size = score.abs() if either_way else score
    best, latent = size.nan_to_num(nan=-torch.inf).max(1)
    return latent, best.masked_fill(best == -torch.inf, torch.nan)


def _transferred(chosen_on: Tensor, scored_on: Tensor, either_way: bool) -> Tensor:
    """The scores [n_concepts] on one half of the columns that are the best on the other, in the direction found."""
    latent, best = _best(chosen_on, either_way)
    score = scored_on.gather(1, latent.unsqueeze(1)).squeeze(1)
    if either_way:
        score = score * chosen_on.gather(1, latent.unsqueeze(1)).squeeze(1).sign()
    return score.masked_fill(best.isnan(), torch.nan)
