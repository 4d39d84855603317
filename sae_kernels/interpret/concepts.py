"""Which latent stands for which concept: exact scores from the sparse codes; rows x d_sae never exists."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import _checks


@dataclass(frozen=True)
class ConceptScores:
    """Every concept against every latent; all [n_concepts, d_sae] float64 but the last three.

    auc: chance that a row with the concept has a larger value than one without, ties counting half. precision and
    recall of "the latent fires" (value not 0), f1 of both. correlation: Pearson's (point-biserial) of the value with
    the label. together: rows with the concept in which the latent fires, int64. AUC and correlation are NaN for a
    concept that all rows or none have; correlation is 0 for a latent of constant value, precision 0 for one that
    never fires. support [n_concepts] int64: rows with the concept; firings [d_sae] int64; rows: int.
    """

    auc: Tensor
    precision: Tensor
    recall: Tensor
    f1: Tensor
    correlation: Tensor
    together: Tensor
    support: Tensor
    firings: Tensor
    rows: int

    @property
    def lift(self) -> Tensor:
        """precision over the share of rows that have the concept, [n_concepts, d_sae]; NaN where no row has it."""
        return self.precision / (self.support.double() / self.rows).unsqueeze(1)

    @property
    def chi_squared(self) -> Tensor:
        """Pearson's statistic of "has the concept" x "fires", [n_concepts, d_sae]; no correction for continuity.

        NaN for a concept that all rows or none have; 0 for a latent that fires in none or in all.
        """
        together, rows = self.together.double(), self.rows
        with_it, fires = self.support.double().unsqueeze(1), self.firings.double()
        margins = with_it * (rows - with_it) * fires * (rows - fires)
        statistic = rows * (together * rows - with_it * fires).square() / margins.clamp(min=1)
        one_sided = (with_it == 0) | (with_it == rows)
        return torch.where(margins > 0, statistic, 0.0).masked_fill(one_sided, torch.nan)


@dataclass(frozen=True)
class ConceptLatent:
    """A concept and a latent that stands for it; together: rows with the concept in which the latent fires."""

    concept: str
    latent: int
    auc: float
    precision: float
    recall: float
    f1: float
    correlation: float
    lift: float
    support: int
    firings: int
    together: int


def concept_scores(values: Tensor, indices: Tensor, d_sae: int, labels: Tensor) -> ConceptScores:
    """Scores every latent as a detector of every concept.

    values [rows, k] floating and indices [rows, k] int32 or int64: the codes of items, or of positions, a latent at
    most once in a row; labels [rows, n_concepts] bool. Time and memory go with rows * k, the number of True labels *
    k, and n_concepts * d_sae. Raises TypeError or ValueError that names the argument.
    """
    _check("concept_scores", values, indices, d_sae, labels)
    if labels.dtype != torch.bool:
        raise TypeError(f"concept_scores: labels must be bool, got {labels.dtype}")
    rows, indices, values = values.shape[0], indices.long(), values.double()
    fires = values != 0
    if fires.any():
        _check_once(fires, indices, d_sae)
    ranks, zero_rank = _ranks(values, indices, fires, d_sae)
    totals = [torch.zeros(labels.shape[1], d_sae, dtype=torch.float64, device=values.device) for _ in range(3)]
    for concept in range(labels.shape[1]):
        members = labels[:, concept].nonzero().squeeze(1)
        where = indices[members].reshape(-1)
        for total, amount in zip(totals, (ranks, values, fires.double()), strict=True):
            total[concept].index_add_(0, where, amount[members].reshape(-1))
    rank_sum, value_sum, together = totals
    support, firings = labels.sum(0), torch.bincount(indices[fires], minlength=d_sae)
    n_with = support.double().unsqueeze(1)
    rank_sum += (n_with - together) * zero_rank
    auc = (rank_sum - n_with * (n_with + 1) / 2) / (n_with * (rows - n_with))
    recall = torch.where(n_with > 0, together / n_with.clamp(min=1), 0.0)
    return ConceptScores(
        auc=auc,
        precision=together / firings.clamp(min=1),
        recall=recall,
        f1=2 * together / (n_with + firings).clamp(min=1),
        correlation=_correlation(values, indices, value_sum, n_with, d_sae),
        together=together.long(),
        support=support,
        firings=firings,
        rows=rows,
    )


def concept_auc(values: Tensor, indices: Tensor, d_sae: int, labels: Tensor) -> Tensor:
    """The exact ROC-AUC of every latent for every concept, [n_concepts, d_sae] float64; arguments as concept_scores."""
    return concept_scores(values, indices, d_sae, labels).auc


def best_latents(
    scores: ConceptScores, names: Sequence[str], *, by: str = "auc", min_support: int = 5
) -> list[ConceptLatent]:
    """For each concept the latent with the best score, concepts in their own order.

    by: "auc", "f1", "precision", "recall", "correlation" or "lift"; equal scores go to the lower latent. Only latents
    that fire in min_support rows of the concept are looked at; a concept without one is left out.
    """
    if by not in ("auc", "f1", "precision", "recall", "correlation", "lift"):
        raise ValueError(f"best_latents: by must be auc, f1, precision, recall, correlation or lift, got {by!r}")
    _check_names("best_latents", scores, names)
    _checks.integer("best_latents", "min_support", min_support, 1, 2**62)
    best, latent = best_scores(scores, by, min_support)
    found = (best > -torch.inf).nonzero().squeeze(1).tolist()
    return [_pair(scores, names, concept, int(latent[concept])) for concept in found]


def best_scores(scores: ConceptScores, by: str, min_support: int) -> tuple[Tensor, Tensor]:
    """The best score of every concept and its latent, both [n_concepts]: as best_latents; -inf where there is none."""
    score = getattr(scores, by)
    score = score.masked_fill((scores.together < min_support) | score.isnan(), -torch.inf)
    best, latents = score.amax(1), torch.arange(score.shape[1], device=score.device)
    return best, torch.where(score == best.unsqueeze(1), latents, score.shape[1]).amin(1)


def either_way_scores(scores: ConceptScores, by: str) -> Tensor:
    """[n_concepts, d_sae]: the score of a column that may point either way; by: "auc" or "correlation"."""
    if by not in ("auc", "correlation"):
        raise ValueError(f"either way there are auc and correlation alone, got {by!r}")
    return torch.maximum(scores.auc, 1 - scores.auc) if by == "auc" else scores.correlation.abs()


def name_latents(
    scores: ConceptScores, names: Sequence[str], *, min_auc: float = 0.6, min_lift: float = 2.0, min_support: int = 5
) -> dict[int, ConceptLatent]:
    """Latent -> its concept of the highest AUC among those that pass all three bounds; min_support as in best_latents.

    Latents without such a concept are absent.
    """
    _check_names("name_latents", scores, names)
    good = (scores.auc >= min_auc) & (scores.lift >= min_lift) & (scores.together >= min_support)
    concept = scores.auc.masked_fill(~good, -torch.inf).argmax(0)
    return {f: _pair(scores, names, int(concept[f]), f) for f in good.any(0).nonzero().squeeze(1).tolist()}


def concept_tfidf(
    values: Tensor, indices: Tensor, d_sae: int, labels: Tensor, orientation: str = "characterises"
) -> Tensor:
    """TF-IDF weights of latents for concepts, [n_concepts, d_sae] float64 (Spisak et al. 2026).

    A concept's mass on a latent is the latent's mean |value| over the concept's rows. "characterises": a concept is a
    document of latents; "unique": a latent is a document of concepts. labels [rows, n_concepts]: bool, or weights >=
    0 such as counts of a tag. The rest as concept_scores. The m largest of a row are the latents to steer a concept
    with.
    """
    return tfidf(concept_mass(values, indices, d_sae, labels), orientation)


def tfidf(mass: Tensor, orientation: str = "characterises") -> Tensor:
    """concept_tfidf from concept_mass [n_concepts, d_sae]."""
    if orientation not in ("characterises", "unique"):
        raise ValueError(f"concept_tfidf: orientation must be 'characterises' or 'unique', got {orientation!r}")
    terms, documents = (1, 0) if orientation == "characterises" else (0, 1)
    frequency = mass / mass.sum(terms, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    idf = ((1 + mass.shape[documents]) / (1 + (mass > 0).sum(documents, keepdim=True))).log() + 1
    return frequency * idf


def concept_mass(values: Tensor, indices: Tensor, d_sae: int, labels: Tensor) -> Tensor:
    """Mean |value| of every latent over the rows of every concept, [n_concepts, d_sae] float64; 0 for an empty one.

    labels [rows, n_concepts]: bool, or weights >= 0 such as counts of a tag: then the weighted mean.
    """
    _check("concept_mass", values, indices, d_sae, labels)
    weights = labels.double()
    if not bool((weights >= 0).all()) or bool(weights.isinf().any()):
        raise ValueError("concept_mass: labels must be finite and not negative")
    weights = weights / weights.sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    mass = torch.zeros(labels.shape[1], d_sae, dtype=torch.float64, device=values.device)
    for concept in range(labels.shape[1]):
        members = weights[:, concept].nonzero().squeeze(1)
        amount = values[members].double().abs() * weights[members, concept].unsqueeze(1)
        mass[concept].index_add_(0, indices[members].long().reshape(-1), amount.reshape(-1))
    return mass


def _ranks(values: Tensor, indices: Tensor, fires: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """Mid-rank of every firing entry among all rows of its latent (0 elsewhere) [rows, k]; that of the zeros [d_sae].

    The rows in which a latent does not fire are one tie at 0, between the negative and the positive values.
    """
    latent, value = indices[fires], values[fires]
    order = value.argsort(stable=True)
    order = order[latent[order].argsort(stable=True)]
    latent, value = latent[order], value[order]
    n = latent.shape[0]
    new = torch.ones(n, dtype=torch.bool, device=value.device)
    new[1:] = (latent[1:] != latent[:-1]) | (value[1:] != value[:-1])
    group = new.cumsum(0) - 1
    starts = new.nonzero().squeeze(1)
    ends = torch.cat([starts[1:], starts.new_full((1,), n)])
    per_latent = torch.bincount(latent, minlength=d_sae)
    before = (per_latent.cumsum(0) - per_latent)[latent]
    rank = (starts + ends + 1)[group].double() / 2 - before
    zeros = values.shape[0] - per_latent
    rank += torch.where(value > 0, zeros[latent], 0)
    ranks = torch.zeros_like(values)
    ranks[fires] = torch.empty_like(rank).scatter_(0, order, rank)
    negative = torch.bincount(latent[value < 0], minlength=d_sae)
    return ranks, negative + (zeros + 1) / 2


def _correlation(values: Tensor, indices: Tensor, value_sum: Tensor, n_with: Tensor, d_sae: int) -> Tensor:
    rows = values.shape[0]
    flat = indices.reshape(-1)
    mean = torch.zeros(d_sae, dtype=torch.float64, device=values.device).index_add_(0, flat, values.reshape(-1)) / rows
    # about the mean, so that a latent of nearly constant value loses nothing: the zeros are added in closed form
    fires = values != 0
    off = torch.where(fires, values - mean[indices], 0)
    spread = torch.zeros_like(mean).index_add_(0, flat, off.square().reshape(-1))
    spread += (rows - torch.bincount(indices[fires], minlength=d_sae)) * mean.square()
    share = n_with / rows
    covariance = value_sum - n_with * mean
    norm = (spread * rows * share * (1 - share)).sqrt()
    varies = (norm > 0) & ~_of_one_value(values, indices, d_sae)
    correlation = torch.where(varies, covariance / norm, 0.0)
    return correlation.masked_fill((n_with == 0) | (n_with == rows), torch.nan)


def _of_one_value(values: Tensor, indices: Tensor, d_sae: int) -> Tensor:
    """[d_sae] bool: latents that fire in every row at one value; rounding leaves a spread of them that is none."""
    flat, value = indices.reshape(-1), values.reshape(-1)
    ends = [value.new_zeros(d_sae).scatter_reduce_(0, flat, value, how, include_self=False) for how in ("amin", "amax")]
    always = torch.bincount(indices[values != 0], minlength=d_sae) == values.shape[0]
    return always & (ends[0] == ends[1])


def _pair(scores: ConceptScores, names: Sequence[str], concept: int, latent: int) -> ConceptLatent:
    numbers = ("auc", "precision", "recall", "f1", "correlation", "lift")
    return ConceptLatent(
        concept=names[concept],
        latent=latent,
        support=int(scores.support[concept]),
        firings=int(scores.firings[latent]),
        together=int(scores.together[concept, latent]),
        **{name: float(getattr(scores, name)[concept, latent]) for name in numbers},
    )


def _check_names(op: str, scores: ConceptScores, names: Sequence[str]) -> None:
    if len(names) != scores.auc.shape[0]:
        raise ValueError(f"{op}: names must have one entry per concept, {scores.auc.shape[0]}, got {len(names)}")


def _check(op: str, values: Tensor, indices: Tensor, d_sae: int, labels: Tensor) -> None:
    _checks.tensor(op, "values", values, 2)
    _checks.tensor(op, "indices", indices, 2)
    _checks.tensor(op, "labels", labels, 2)
    _checks.integer(op, "d_sae", d_sae, 1, 2**31 - 1)
    _checks.floating(op, values=values)
    if values.shape != indices.shape:
        shapes = f"values {tuple(values.shape)} and indices {tuple(indices.shape)}"
        raise ValueError(f"{op}: {shapes} must both be [rows, k]")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: indices must be int32 or int64, got {indices.dtype}")
    if labels.shape[0] != values.shape[0]:
        raise ValueError(f"{op}: labels must have one row per code, {values.shape[0]}, got {tuple(labels.shape)}")
    _checks.same_device(op, "values", values, "indices", indices)
    _checks.same_device(op, "values", values, "labels", labels)
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < d_sae:
        low, high = (int(end) for end in indices.aminmax())
        raise ValueError(f"{op}: indices must be in [0, d_sae = {d_sae}), got values from {low} to {high}")
    bad = values.isnan().any(1) | values.isinf().any(1)
    if bool(bad.any()):
        raise ValueError(f"{op}: values of row {int(bad.nonzero()[0])} hold NaN or Inf")


def _check_once(fires: Tensor, indices: Tensor, d_sae: int) -> None:
    rows = torch.arange(fires.shape[0], device=fires.device).unsqueeze(1)
    places = (rows * d_sae + indices)[fires].sort().values
    repeated = places[1:][places[1:] == places[:-1]]
    if repeated.numel():
        row, latent = divmod(int(repeated[0]), d_sae)
        raise ValueError(f"concept_scores: indices of row {row} name latent {latent} twice with a value")
