"""concept_map: every concept against every latent by all measures, with controls and confidence, in one call."""

import copy
import difflib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.interactions import Concepts
from ..nn import TopKSAE
from ..ops import _checks
from ..ops.activation_stats import ActivationStats
from .bootstrap import bootstrap_intervals
from .concepts import ConceptScores, best_scores, concept_mass, concept_scores, either_way_scores, tfidf
from .lens import logit_lens

CHUNK = 4096  # rows that are encoded at once
SCORES = ("auc", "correlation", "precision", "recall", "f1", "lift", "chi_squared")


@dataclass(frozen=True)
class ConceptMap:
    """What concept_map found. Rows of the matrices are the concepts `names`; columns are latents.

    scores, raw, random: ConceptScores of the SAE, of the single dimensions of its input and of an untrained SAE (the
    last two None without baselines). characterises, unique: the TF-IDF weights; mass: what they come from; lens: the
    logit lens or None. stats: of the rows' codes, with the top items. auc_interval, correlation_interval
    [n_concepts, 2]: bootstrap, for the best latent by each; NaN where none has the support. left_out: concept -> why it
    is not among the names.
    """

    names: list[str]
    left_out: dict[str, str]
    scores: ConceptScores
    characterises: Tensor
    unique: Tensor
    mass: Tensor
    lens: Tensor | None
    raw: ConceptScores | None
    random: ConceptScores | None
    stats: ActivationStats
    auc_interval: Tensor
    correlation_interval: Tensor
    min_support: int

    def latents(self, concept: str, m: int = 5, by: str = "characterises") -> list[int]:
        """The m latents that stand most for a concept, the strongest first: what to steer with.

        by: "characterises", "unique", "lens" or a score of ConceptScores. Only latents with min_support firings on the
        concept are given (any, for "lens"), so that there may be fewer than m. Raises ValueError for an unknown
        concept, listing the nearest names.
        """
        _checks.integer("latents", "m", m, 1, self.mass.shape[1])
        place = self._place(concept)
        row = self._measure(by)[place]
        rare = self.scores.together[place] < (0 if by == "lens" else self.min_support)
        row = row.masked_fill(rare | row.isnan(), -torch.inf)
        order = row.argsort(descending=True, stable=True)[:m]
        return order[row[order] > -torch.inf].tolist()

    def weights(self, concept: str, m: int = 50, by: str = "lens") -> tuple[list[int], list[float]]:
        """latents(concept, m, by) with what each is worth, for mix(latents, alpha, weights): those above 0 alone.

        More latents with weights steer further at the same loss than a few alike. Raises ValueError where none is left.
        """
        row = self._measure(by)[self._place(concept)]
        chosen = self.latents(concept, min(m, len(row)), by)
        found = [(f, float(row[f])) for f in chosen if row[f] > 0]
        if not found:
            raise ValueError(
                f"weights: no latent stands for {concept!r} by {by} with at least {self.min_support} firings"
            )
        latents, worth = zip(*found, strict=True)
        return list(latents), list(worth)

    def best(self, by: str = "auc") -> dict[str, tuple[int, float]]:
        """concept -> (latent, score) of its best latent with min_support firings on it; concepts without one absent."""
        score, latent = best_scores(self.scores, by, self.min_support)
        found = zip(self.names, latent.tolist(), score.tolist(), strict=True)
        return {name: (f, value) for name, f, value in found if value > -torch.inf}

    def baselines(self, by: str = "auc") -> dict[str, Tensor]:
        """The best score per concept, [n_concepts] float64, of "sae" and, where there, "raw" and "random".

        by: a score of ConceptScores; "raw" for AUC and correlation alone. A raw dimension may point either way:
        max(AUC, 1 - AUC), |correlation|. NaN where no latent has the support.
        """
        if by not in SCORES:
            raise ValueError(f"baselines: by must be one of {', '.join(SCORES)}, got {by!r}")
        found = {"sae": best_scores(self.scores, by, self.min_support)[0]}
        if self.raw is not None and by in ("auc", "correlation"):
            found["raw"] = either_way_scores(self.raw, by).amax(1)
        if self.random is not None:
            found["random"] = best_scores(self.random, by, self.min_support)[0]
        return {name: score.masked_fill(score.isinf(), torch.nan) for name, score in found.items()}

    def table(self) -> list[dict[str, str | int | float | None]]:
        """One row per concept: support, the best latent and score by AUC and by correlation with their intervals, what
        the raw dimensions and the untrained SAE reach; the same without intervals by precision, recall, F1 and chi
        squared (raw dimensions never fall silent: nothing of theirs to count); the best latent by TF-IDF and by the
        lens. None for nothing."""
        columns: dict[str, list] = {"concept": self.names, "support": self.scores.support.tolist()}
        for by in ("auc", "correlation", "precision", "recall", "f1", "chi_squared"):
            columns[f"{by}_latent"] = [self.best(by).get(name, (None,))[0] for name in self.names]
            for name, score in self.baselines(by).items():
                columns[by if name == "sae" else f"{by}_{name}"] = score.tolist()
            if by in ("auc", "correlation"):
                low, high = getattr(self, f"{by}_interval").unbind(1)
                columns[f"{by}_low"], columns[f"{by}_high"] = low.tolist(), high.tolist()
        for by in ("characterises", "unique", "lens"):
            if by != "lens" or self.lens is not None:
                columns[f"{by}_latent"] = [next(iter(self.latents(name, 1, by)), None) for name in self.names]
        rows = zip(*columns.values(), strict=True)
        return [
            {key: None if value != value else value for key, value in zip(columns, row, strict=True)} for row in rows
        ]

    def summary(self) -> dict[str, float]:
        """Means over the concepts, and the SAE against the controls.

        auc_gain_over_raw: the SAE's mean AUC above 0.5 over the raw dimensions'; correlation_gain_over_raw: the ratio
        of the means; over the concepts that both have. auc_above_random, correlation_above_random: share of the
        concepts. live_share: of the latents that fire on any row. NaN where a control is absent.
        """
        found = {"concepts": len(self.names), "left_out": len(self.left_out), "rows": self.scores.rows}
        found["live_share"] = 1 - self.stats.dead_share
        for by, chance in (("auc", 0.5), ("correlation", 0.0)):
            scores = self.baselines(by)
            for name, score in scores.items():
                found[f"mean_{by}" if name == "sae" else f"mean_{by}_{name}"] = float(score.nanmean())
            nothing = torch.full_like(scores["sae"], torch.nan)
            sae, raw, random = (scores.get(name, nothing) for name in ("sae", "raw", "random"))
            both = ~(sae.isnan() | raw.isnan())
            found[f"{by}_gain_over_raw"] = float((sae[both].mean() - chance) / (raw[both].mean() - chance))
            both = ~(sae.isnan() | random.isnan())
            above = sae[both] > random[both]
            found[f"{by}_above_random"] = float(above.double().mean())
        return found

    def describe(self) -> str:
        """One line, and one for every concept that was left out."""
        latents = self.mass.shape[1]
        head = f"{len(self.names)} concepts x {latents:,} latents on {self.scores.rows:,} rows"
        lines = [f"{head}; {1 - self.stats.dead_share:.1%} of the latents fire; {len(self.left_out)} concepts left out"]
        return "\n".join([*lines, *(f"left out {name!r}: {why}" for name, why in self.left_out.items())])

    def _place(self, concept: str) -> int:
        if concept in self.names:
            return self.names.index(concept)
        if concept in self.left_out:
            raise ValueError(f"concept {concept!r} was left out: {self.left_out[concept]}")
        near = difflib.get_close_matches(concept, self.names, 5, 0.3) or self.names[:5]
        raise ValueError(f"unknown concept {concept!r}; the nearest are {', '.join(map(repr, near))}")

    def _measure(self, by: str) -> Tensor:
        if by in SCORES:
            return getattr(self.scores, by)
        if by not in ("characterises", "unique", "lens"):
            raise ValueError(f"by must be one of characterises, unique, lens, {', '.join(SCORES)}, got {by!r}")
        if by == "lens" and self.lens is None:
            raise ValueError("by='lens' needs the item embeddings of a linear head: concept_map(..., head=...)")
        return getattr(self, by)


@torch.no_grad()
def concept_map(
    x: Tensor,
    sae: TopKSAE,
    concepts: Concepts,
    *,
    items: Tensor | None = None,
    head: Tensor | None = None,
    min_support: int = 5,
    baselines: bool = True,
    resamples: int = 200,
    examples: int = 10,
    seed: int = 0,
) -> ConceptMap:
    """Scores all latents of the SAE against all concepts, from its codes of x; no dense code exists.

    x [rows, d_in]: embeddings of single items (`item_embeddings(model)`), or of positions; items [rows] int64: the item
    of every row, row r being item r where None. head [n_items, d_in]: the item embeddings of a linear head, for the
    logit lens. Concepts on fewer than min_support rows, or on all, are left out and named. baselines: the same for the
    raw dimensions of x and for an untrained SAE. resamples: of the bootstrap, over items; 0 for none. examples: top
    rows kept per latent. Raises TypeError or ValueError that names the argument.
    """
    items = checked_items("concept_map", x, sae, concepts, items)
    _checks.integer("concept_map", "min_support", min_support, 1, 2**62)
    _checks.integer("concept_map", "resamples", resamples, 0, 10**6)
    labels, names, left_out = supported("concept_map", concepts, items, min_support)
    values, indices = encoded(sae, x)
    stats = ActivationStats(sae.d_sae, top=examples)
    stats.update(values, indices, ids=items)
    scores = concept_scores(values, indices, sae.d_sae, labels)
    mass = concept_mass(values, indices, sae.d_sae, labels)
    raw = random = None
    if baselines:
        every = torch.arange(sae.d_in).expand(len(x), -1)
        raw = concept_scores(x, every, sae.d_in, labels)
        random = concept_scores(*encoded(untrained(sae, seed), x), sae.d_sae, labels)
    kept = torch.tensor([concepts.names.index(name) for name in names], dtype=torch.int64)
    lens = None if head is None else logit_lens(sae.W_dec, head, concepts.labels[:, kept])
    auc_interval, correlation_interval = (
        _intervals(values, indices, labels, items, scores, by, min_support, resamples, seed)
        for by in ("auc", "correlation")
    )
    return ConceptMap(
        names=names,
        left_out=left_out,
        scores=scores,
        characterises=tfidf(mass, "characterises"),
        unique=tfidf(mass, "unique"),
        mass=mass,
        lens=lens,
        raw=raw,
        random=random,
        stats=stats,
        auc_interval=auc_interval,
        correlation_interval=correlation_interval,
        min_support=min_support,
    )


def untrained(sae: TopKSAE, seed: int = 0) -> TopKSAE:
    """A SAE of these sizes, normaliser and refit that has learnt nothing: the control for the best of d_sae.

    A TopKSAE with tied weights, whatever the SAE is: how it started is not kept, and the thresholds of a JumpReLUSAE or
    a BatchTopKSAE come from training alone. It fires k latents per row, as those are trained to on average.
    """
    generator = torch.Generator(sae.W_enc.device).manual_seed(seed)
    options = {"activation": sae.activation, "device": sae.W_enc.device, "dtype": sae.W_enc.dtype}
    blank = TopKSAE(sae.d_in, sae.d_sae, sae.k, generator=generator, **options)
    blank.normalizer, blank.refit = copy.deepcopy(sae.normalizer), sae.refit
    return blank.eval()


def encoded(sae: TopKSAE, x: Tensor) -> tuple[Tensor, Tensor]:
    codes = [sae.encode(part) for part in x.split(CHUNK)]
    return torch.cat([code.values for code in codes]), torch.cat([code.indices for code in codes])


def _intervals(values, indices, labels, items, scores, by, min_support, resamples, seed) -> Tensor:
    score, latent = best_scores(scores, by, min_support)
    chosen = (score > -torch.inf).nonzero().squeeze(1) if resamples else score.new_zeros(0, dtype=torch.int64)
    ends = torch.full((len(score), 2), torch.nan, dtype=torch.float64)
    pairs = [(c, int(latent[c])) for c in chosen.tolist()]
    if pairs:
        found = bootstrap_intervals(values, indices, labels, pairs, resamples=resamples, groups=items, seed=seed)
        ends[chosen] = torch.stack([getattr(found, f"{by}_low"), getattr(found, f"{by}_high")], 1)
    return ends


def supported(op: str, concepts: Concepts, items: Tensor, min_support: int) -> tuple[Tensor, list[str], dict[str, str]]:
    labels = concepts.labels[items]
    support, rows = labels.sum(0).tolist(), len(items)
    left_out = {}
    for name, count in zip(concepts.names, support, strict=True):
        if count < min_support:
            left_out[name] = f"{count} of {rows:,} rows have it, min_support is {min_support}"
        elif count == rows:
            left_out[name] = f"all {rows:,} rows have it"
    kept = torch.tensor([name not in left_out for name in concepts.names], dtype=torch.bool)
    if not bool(kept.any()):
        raise ValueError(f"{op}: no concept of {len(kept)} has {min_support} of the {rows:,} rows and lacks one")
    return labels[:, kept], [name for name in concepts.names if name not in left_out], left_out


def checked_items(op: str, x: Tensor, sae: TopKSAE, concepts: Concepts, items: Tensor | None) -> Tensor:
    """items [rows] int64, row r being item r where None; the errors of concept_map."""
    _checks.tensor(op, "x", x, 2)
    if not isinstance(concepts, Concepts):
        raise TypeError(f"{op}: concepts must be Concepts, got {type(concepts).__name__}")
    repeated = [name for place, name in enumerate(concepts.names) if name in concepts.names[:place]]
    if repeated:
        raise ValueError(f"{op}: concepts must have names of their own, {repeated[0]!r} stands twice")
    if x.shape[1] != sae.d_in:
        raise ValueError(f"{op}: x {tuple(x.shape)} must end in the SAE's d_in = {sae.d_in}")
    n_items = len(concepts.labels)
    if items is None:
        if len(x) != n_items:
            raise ValueError(f"{op}: x has {len(x)} rows and the concepts {n_items} items; give items, one per row")
        return torch.arange(n_items)
    _checks.tensor(op, "items", items, 1)
    if items.dtype != torch.int64 or len(items) != len(x):
        came = f"{items.dtype} {tuple(items.shape)}"
        raise ValueError(f"{op}: items must be int64, one per row of x {tuple(x.shape)}, got {came}")
    if items.numel() and not 0 <= int(items.min()) <= int(items.max()) < n_items:
        raise ValueError(f"{op}: items must be in [0, {n_items}), got {int(items.min())} to {int(items.max())}")
    return items
