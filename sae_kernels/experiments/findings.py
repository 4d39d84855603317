"""What the demo says about latents: concepts they stand for, items they fire on, what steering by them does."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..interpret import best_latents, concept_scores, concept_tfidf, latent_examples, name_latents, untrained
from ..nn import TopKSAE
from ..ops.activation_stats import ActivationStats
from ..steer import attached, mix, steering_table
from .stages import K, Parts, coded_items

STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.5)
STEERED = 5  # concepts steered towards
MIXED = 5  # latents a concept is steered with
EXAMPLES = 5
LISTED = 400  # latents in the report's table


def interpret(model: nn.Module, sae: TopKSAE, parts: Parts, counts: Tensor) -> dict[str, Any]:
    """Concepts with their best latents, latents with their names and top items, and two controls for the AUC.

    counts [d_sae]: on how many rows each latent fired.
    """
    values, indices, items, x = coded_items(model, sae, parts)
    examples = _examples(values, indices, items, parts, sae.d_sae)
    found: dict[str, Any] = {"latents": _latents(counts, examples, {}), "concepts": [], "interpreted_rows": len(items)}
    concepts = parts.data.concepts
    if concepts is None:
        found["latent_items"] = _own_items(values, indices, items, parts.data.n_items, sae.d_sae)
        return found
    labels = concepts.labels[items]
    scores = concept_scores(values, indices, sae.d_sae, labels)
    best = best_latents(scores, concepts.names)
    if not best:
        found["latent_items"] = _own_items(values, indices, items, parts.data.n_items, sae.d_sae)
        return found
    weight = concept_tfidf(values, indices, sae.d_sae, labels)
    place = {name: i for i, name in enumerate(concepts.names)}
    found["concepts"] = [
        {
            **asdict(one),
            "items": int(concepts.labels[:, place[one.concept]].sum()),
            "examples": [e["title"] for e in examples.get(one.latent, [])],
            "steer_with": weight[place[one.concept]].topk(min(MIXED, sae.d_sae)).indices.tolist(),
        }
        for one in best
    ]
    found["latents"] = _latents(counts, examples, name_latents(scores, concepts.names))
    kept = torch.tensor([place[one.concept] for one in best])
    found["mean_auc"] = float(torch.tensor([one.auc for one in best]).mean())
    found["mean_auc_untrained"], found["untrained_concepts"] = _untrained(sae, x, labels[:, kept])
    found["mean_auc_raw"] = float(best_raw_auc(x, labels[:, kept]).mean())
    return found


def _examples(
    values: Tensor, indices: Tensor, items: Tensor, parts: Parts, d_sae: int
) -> dict[int, list[dict[str, Any]]]:
    """latent -> its top items, each item once (at its strongest position)."""
    # the same item stands at many positions of the sequences: more are kept than shown
    stats = ActivationStats(d_sae, top=EXAMPLES if len(items) == parts.data.n_items else 8 * EXAMPLES)
    stats.update(values, indices, ids=items)
    titles = parts.data.item_titles or [str(item) for item in parts.data.item_ids]
    return {
        latent: [{"title": e.title, "value": e.value} for e in found]
        for latent, found in latent_examples(stats, titles, distinct=EXAMPLES).items()
    }


def _own_items(values: Tensor, indices: Tensor, items: Tensor, n_items: int, d_sae: int) -> dict[int, list[int]]:
    """For STEERED latents, the items that fire them most strongly: those with most such items, a tenth at most."""
    fires = values[:, 0] > 0
    pairs = torch.stack([indices[fires, 0].long(), items[fires]], 1).unique(dim=0)
    sizes = torch.bincount(pairs[:, 0], minlength=d_sae)
    chosen = sizes.masked_fill(sizes > max(n_items // 10, 1), 0).topk(min(STEERED, d_sae)).indices.tolist()
    return {f: pairs[pairs[:, 0] == f, 1].tolist() for f in chosen if sizes[f] > 0}


def _latents(counts: Tensor, examples: dict[int, list[dict[str, Any]]], names: dict[int, Any]) -> list[dict[str, Any]]:
    """The named latents by AUC, then the others by how often they fire; at most LISTED."""
    density = (counts.double() / counts.max().clamp(min=1)).tolist()
    rows = [
        {
            "latent": f,
            "name": names[f].concept if f in names else None,
            "auc": names[f].auc if f in names else None,
            "fired_rows": int(counts[f]),
            "examples": examples.get(f, []),
        }
        for f in range(len(counts))
        if counts[f] > 0
    ]
    return sorted(rows, key=lambda row: (-(row["auc"] or 0), -density[row["latent"]]))[:LISTED]


def _untrained(sae: TopKSAE, x: Tensor, labels: Tensor) -> tuple[float, int]:
    """The mean best AUC of a SAE that has learnt nothing, what picking the best of d_sae is worth alone; and over how
    many concepts: those on which one of its latents has the support, NaN where there is none.
    """
    blank = untrained(sae)
    with torch.no_grad():
        codes = [blank.encode(part) for part in x.split(4096)]
    values, indices = torch.cat([c.values for c in codes]), torch.cat([c.indices for c in codes])
    best = best_latents(concept_scores(values, indices, sae.d_sae, labels), [str(i) for i in range(labels.shape[1])])
    return float(torch.tensor([one.auc for one in best]).mean()), len(best)


def best_raw_auc(x: Tensor, labels: Tensor) -> Tensor:
    """For every concept the best AUC of one raw dimension of x [rows, d], either way: [n_concepts] float64."""
    auc = concept_scores(x, torch.arange(x.shape[1]).expand_as(x), x.shape[1], labels).auc
    return torch.maximum(auc, 1 - auc).amax(1)


def steer(model: nn.Module, sae: TopKSAE, parts: Parts, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Steering towards the best-read concepts (or, where none are named, the items of strong latents), row by row."""
    steered = attached(model, sae, positions=model.positions)
    rows = []
    for name, latents, members in _goals(parts, found):
        table = steering_table(
            steered,
            lambda alpha, latents=latents: mix(latents, alpha),
            members,
            parts.test.inputs,
            parts.test.targets,
            strengths=STRENGTHS,
            k=K,
        )
        rows += [{"concept": name, "latents": latents, **asdict(row)} for row in table]
    return rows


def _goals(parts: Parts, found: dict[str, Any]) -> list[tuple[str, list[int], Tensor]]:
    """(name, latents, items [n_items] bool) to steer towards."""
    concepts = parts.data.concepts
    if found["concepts"]:
        large = [row for row in found["concepts"] if row["items"] >= K] or found["concepts"]
        chosen = sorted(large, key=lambda row: -row["auc"])[:STEERED]
        columns = [concepts.names.index(row["concept"]) for row in chosen]
        return [
            (row["concept"], row["steer_with"], concepts.labels[:, column])
            for row, column in zip(chosen, columns, strict=True)
        ]
    return [(f"items of latent {f}", [f], torch.tensor(items)) for f, items in found["latent_items"].items()]


def average_steering(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The mean over the concepts at every strength."""
    means = []
    for strength in STRENGTHS:
        here = [row for row in rows if row["strength"] == strength]
        figures = {
            name: sum(row[name] for row in here) / len(here) for name in ("concept_share", "ndcg", "segment_ndcg")
        }
        means.append({"strength": strength, **figures})
    return means
