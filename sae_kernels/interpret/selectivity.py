"""How selective latents and concepts are: entropy, divergence from the average, and one table of all latents."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import _checks
from .concept_map import ConceptMap
from .concepts import ConceptScores, either_way_scores, name_latents
from .examples import latent_examples


@dataclass(frozen=True)
class Selectivity:
    """Of the rows of a mass matrix, each as a distribution over its columns; all [rows] float64, NaN for an empty row.

    entropy in bits; divergence: KL(row || mean row) in bits; decrease: (H - entropy) / H, H the entropy of the mean
    row: 1 for a row on a single column, 0 for one as spread as the average (Spisak et al. 2026 take the divergence the
    other way round, KL(mean || row), which is infinite wherever a row has a zero).
    """

    entropy: Tensor
    divergence: Tensor
    decrease: Tensor


def selectivity(mass: Tensor) -> Selectivity:
    """mass [rows, columns] >= 0, such as concept_mass (concepts over latents) or its transpose (latents over concepts).

    The mean row is that of the distributions, over the rows that hold anything.
    """
    _checks.tensor("selectivity", "mass", mass, 2)
    mass = mass.double()
    if not bool((mass >= 0).all()) or bool(mass.isinf().any()):
        raise ValueError("selectivity: mass must be finite and not negative")
    total = mass.sum(1, keepdim=True)
    share = mass / total
    mean = share[total.squeeze(1) > 0].mean(0)
    entropy = -torch.xlogy(share, share).sum(1) / torch.log(torch.tensor(2.0)).double()
    ratio = torch.where(share > 0, share / mean, 1.0)
    divergence = (share * ratio.log2()).sum(1)
    average = -(torch.xlogy(mean, mean).sum()) / torch.log(torch.tensor(2.0)).double()
    # over one column there is nothing to be selective about
    return Selectivity(entropy, divergence, (average - entropy) / average if average > 0 else entropy * 0)


def explained_share(
    scores: ConceptScores, thresholds: Sequence[float], by: str = "correlation", *, either_way: bool = False
) -> list[float]:
    """Share of the latents that fire whose best concept reaches each threshold; by: a score of ConceptScores.

    either_way: max(AUC, 1 - AUC) or |correlation| counts, as for raw dimensions; by those two alone.
    """
    if by not in ("auc", "correlation", "precision", "recall", "f1"):
        raise ValueError(f"explained_share: by must be auc, correlation, precision, recall or f1, got {by!r}")
    score = either_way_scores(scores, by) if either_way else getattr(scores, by)
    best = score.nan_to_num(nan=-torch.inf).amax(0)[scores.firings > 0]
    return [float((best >= threshold).double().mean()) for threshold in thresholds]


def latent_table(
    found: ConceptMap,
    titles: Sequence[str] | None = None,
    *,
    examples: int = 5,
    min_auc: float = 0.6,
    min_lift: float = 2.0,
) -> list[dict]:
    """One row per latent that fires, the most selective first.

    latent, fires (rows), share (of the rows), mean and max (of its values where it fires), name (name_latents with
    min_auc and min_lift, else None), concept and correlation (its best by correlation), auc (its best), entropy,
    divergence and decrease over the concepts (None where it fires on no concept), examples: (title, value) of its top
    items, each once; ids in place of titles without them; none where the map keeps none.
    """
    _checks.integer("latent_table", "examples", examples, 0, 2**20)
    stats, scores = found.stats, found.scores
    if stats.top_ids is None:
        shown = {latent: [] for latent in (stats.counts > 0).nonzero().squeeze(1).tolist()}
    else:
        titles = [str(i) for i in range(int(stats.top_ids.max()) + 1)] if titles is None else titles
        shown = latent_examples(stats, titles, distinct=examples)
    names = name_latents(scores, found.names, min_auc=min_auc, min_lift=min_lift, min_support=found.min_support)
    over = selectivity(found.mass.T)
    correlation, concept = scores.correlation.max(0)
    numbers = {
        "fires": stats.counts,
        "share": stats.density,
        "mean": stats.mean,
        "max": stats.max,
        "correlation": correlation,
        "auc": scores.auc.amax(0),
        "entropy": over.entropy,
        "divergence": over.divergence,
        "decrease": over.decrease,
    }
    columns = {name: values.tolist() for name, values in numbers.items()}
    rows = [
        {
            "latent": latent,
            "name": names[latent].concept if latent in names else None,
            "concept": found.names[int(concept[latent])],
            **{name: _number(values[latent]) for name, values in columns.items()},
            "examples": [(example.title, example.value) for example in shown[latent]],
        }
        for latent in shown
    ]
    return sorted(rows, key=lambda row: (row["decrease"] is None, -(row["decrease"] or 0), row["latent"]))


def concept_selectivity(found: ConceptMap) -> list[dict]:
    """One row per concept: entropy, divergence and decrease over the latents, the most selective first."""
    over = selectivity(found.mass)
    rows = [
        {"concept": name, "entropy": _number(e), "divergence": _number(d), "decrease": _number(r)}
        for name, e, d, r in zip(
            found.names, over.entropy.tolist(), over.divergence.tolist(), over.decrease.tolist(), strict=True
        )
    ]
    return sorted(rows, key=lambda row: (row["decrease"] is None, -(row["decrease"] or 0), row["concept"]))


def _number(value: float) -> float | None:
    return None if value != value else value
