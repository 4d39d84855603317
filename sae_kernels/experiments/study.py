"""What the latents of a demo run mean, what they explain, and what steering by them does, as tables and pages."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import _plots
from ..data import Concepts
from ..interpret import (
    ConceptMap,
    concept_map,
    concept_selectivity,
    explain,
    item_codes,
    latent_table,
    name_latents,
)
from ..interpret import plots as concept_plots
from ..nn import TopKSAE
from ..recommenders import SASRec
from ..steer import (
    STRENGTHS,
    Goals,
    Lists,
    SteeredRanker,
    SteeringRow,
    Users,
    at_loss,
    compare_steering,
    latent_lists,
    linear_probes,
    over_represented,
    pareto_front,
    probe_lists,
    rerank_lists,
)
from ..steer import plots as steer_plots
from ..train import load_sae
from . import stages
from .demo import DemoConfig
from .stages import K, Parts

FEW, MANY, NEAR = 10, 50, 200  # latents of a concept: alike, weighted, and weighted by how near they are to the user
LOSS = 0.05  # of personal nDCG, at which methods are compared


@dataclass(frozen=True)
class StudyConfig:
    """run: a folder that the demo has written; out: run / "study" where None. users: held-out ones that are steered.

    untagged: share of the items whose tags the methods do not see, while the figures count by all tags: what a
    catalogue with gaps does to each method.
    """

    run: Path
    out: Path | None = None
    users: int = 2000
    explained: int = 5
    untagged: float = 0.0
    strengths: tuple[float, ...] = STRENGTHS
    resamples: int = 200


def run_study(config: StudyConfig) -> tuple[ConceptMap, list[SteeringRow]]:
    """Writes concepts, latents and steering as CSV and HTML, and explanations.txt. Prints what each file says.

    Raises FileNotFoundError where the folder holds no run, ValueError for a run without concepts.
    """
    for name, least in (("users", 1), ("explained", 0), ("resamples", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(config, name)}")
    if not 0 <= config.untagged < 1:
        raise ValueError(f"--untagged must be in [0, 1), got {config.untagged}")
    out = Path(config.run) / "study" if config.out is None else Path(config.out)
    model, sae, parts = _load(Path(config.run))
    found, told = _map(model, sae, parts, config)
    out.mkdir(parents=True, exist_ok=True)
    titles = parts.data.item_titles or [str(item) for item in parts.data.item_ids]
    print(found.describe())
    selective = {row.pop("concept"): row for row in concept_selectivity(found)}
    _write(out / "concepts.csv", [{**row, **selective[row["concept"]]} for row in found.table()])
    latents = latent_table(found, titles)
    _write(out / "latents.csv", [{**row, "examples": "; ".join(t for t, _ in row["examples"])} for row in latents])
    _plots.write_page(concept_plots.pages(found), out / "concepts.html", f"{parts.data.name}: concepts and latents")
    for name, value in found.summary().items():
        print(f"  {name:<28}{value:>10,.4g}")
    rows = _steering(model, sae, parts, found, told, config, out)
    if config.explained:
        _explanations(model, sae, parts, found, titles, config, out)
    print(f"tables and pages: {out}")
    return found, rows


def _load(run: Path) -> tuple[nn.Module, TopKSAE, Parts]:
    note = run / "run.json"
    if not note.is_file():
        raise FileNotFoundError(f"{run} holds no run of the demo (no run.json)")
    settings = json.loads(note.read_text())
    for name in ("data", "interactions"):
        settings[name] = None if settings[name] is None else Path(settings[name])
    settings = DemoConfig(**{**settings, "simulate": tuple(settings["simulate"])}).filled()
    data = stages.load_data(settings)
    if data.concepts is None:
        raise ValueError(f"{data.name} names no concepts for its items, so there is nothing to map latents to")
    parts = stages.split(data, settings)
    model = stages.new_recommender(parts, settings)
    stages.restore_recommender(model, run / "recommender.safetensors")
    return model, load_sae(run / "sae"), parts


def _map(model: nn.Module, sae: TopKSAE, parts: Parts, config: StudyConfig) -> tuple[ConceptMap, Tensor]:
    """The map from the items whose tags are told [n_items] bool, and which those are."""
    n_items, concepts = parts.data.n_items, parts.data.concepts
    told = torch.rand(n_items, generator=torch.Generator().manual_seed(0)) >= config.untagged
    *_, items, x = stages.coded_items(model, sae, parts)
    kept = told[items]
    head = SteeredRanker(model, sae).head
    # the lens asks for all items: those that are not told have no tag
    shown = Concepts(concepts.names, concepts.labels & told.unsqueeze(1))
    lens = head.items if head.linear else None
    return concept_map(x[kept], sae, shown, items=items[kept], head=lens, resamples=config.resamples), told


def _steering(
    model: nn.Module, sae: TopKSAE, parts: Parts, found: ConceptMap, told: Tensor, config: StudyConfig, out: Path
) -> list[SteeringRow]:
    by = "correlation" if found.lens is None else "lens"
    names = [name for name in found.names if found.latents(name, 1)]
    if not names:
        raise ValueError(f"no concept has a latent with {found.min_support} firings on it: nothing to steer by")
    columns = [parts.data.concepts.names.index(name) for name in names]
    concepts = Concepts(names, parts.data.concepts.labels[:, columns])
    first = torch.arange(min(config.users, len(parts.test.inputs)))
    inputs, targets = parts.test.inputs.select(first), parts.test.targets.select(first)
    goals, rows = over_represented(concepts, inputs, targets)
    inputs, targets = inputs.select(rows), targets.select(rows)
    print(f"steering {len(rows):,} of {len(first):,} users, the others have no target with a concept")
    lists = _methods(model, sae, parts, found, goals, told, by, inputs)
    popularity = torch.bincount(parts.train.flat, minlength=parts.data.n_items)
    embeddings = SteeredRanker(model, sae).head.items
    table = compare_steering(
        lists, goals, inputs, targets, strengths=config.strengths, embeddings=embeddings, popularity=popularity,
        resamples=config.resamples,
    )  # fmt: skip
    front = {(row.method, row.strength) for row in pareto_front(table)}
    flat = []
    for row in table:
        figures = asdict(row)
        errors = {f"{name}_error": value for name, value in figures.pop("errors").items()}
        flat.append({**figures, **errors, "on_front": (row.method, row.strength) in front})
    _write(out / "steering.csv", flat)
    base = next(row for row in table if row.method == "tag re-rank" and row.strength == 0)
    _plots.write_page(steer_plots.pages(table, base.ndcg), out / "steering.html", f"{parts.data.name}: steering")
    _say(table, base)
    return table


def _methods(
    model: nn.Module, sae: TopKSAE, parts: Parts, found: ConceptMap, goals: Goals, told: Tensor, by: str, inputs
) -> dict[str, Lists]:
    """Every method knows the tags of the told items alone. At strength 0 the last two are the model without a SAE."""
    plain, full = SteeredRanker(model, sae), SteeredRanker(model, sae, error_term=True)
    users = plain.encode(inputs)
    few = [found.latents(name, FEW) for name in goals.names]
    many, worth = zip(*(found.weights(name, MANY, by) for name in goals.names), strict=True)
    near, worth_near = zip(*(found.weights(name, NEAR, by) for name in goals.names), strict=True)
    *_, items, x = stages.coded_items(model, sae, parts)
    kept = told[items]
    probes = linear_probes(x[kept], goals.labels[items[kept]], ridge=100.0)
    known = Goals(goals.names, goals.labels & told.unsqueeze(1), goals.concept)
    return {
        f"{FEW} latents by TF-IDF": latent_lists(plain, users, goals, few, K),
        f"{MANY} latents by {by}": latent_lists(plain, users, goals, many, K, worth),
        "the same, with error term": latent_lists(full, users, goals, many, K, worth),
        f"{NEAR} latents near the user": latent_lists(full, users, goals, near, K, worth_near, near=True),
        "linear probe": probe_lists(full, users, goals, probes, K),
        "tag re-rank": rerank_lists(full, users, known, K),
    }


def _say(table: Sequence[SteeringRow], base: SteeringRow) -> None:
    print(f"without a SAE: nDCG@{K} {base.ndcg:.4f}, of the segment {base.segment_ndcg:.4f}")
    print(f"{'at ' + format(LOSS, '.0%') + ' loss':<28}{'strength':>9}{'nDCG':>9}{'segment':>9}{'gain':>7}")
    for name, row in at_loss(table, base.ndcg, LOSS).items():
        gain = row.segment_ndcg / base.segment_ndcg if base.segment_ndcg else float("nan")
        print(f"{name:<28}{row.strength:>9}{row.ndcg:>9.4f}{row.segment_ndcg:>9.4f}{gain:>6.2f}x")


def _explanations(
    model: nn.Module,
    sae: TopKSAE,
    parts: Parts,
    found: ConceptMap,
    titles: Sequence[str],
    config: StudyConfig,
    out: Path,
) -> None:
    """The first recommendation of the first users, in words."""
    ranker = SteeredRanker(model, sae)
    users: Users = ranker.encode(parts.test.inputs.select(torch.arange(min(config.explained, len(parts.test.inputs)))))
    names = {f: one.concept for f, one in name_latents(found.scores, found.names).items()}
    items = None if isinstance(model, SASRec) else item_codes(model, sae)
    best = ranker.rank(users, 1)[0][:, 0].tolist()
    texts = [
        explain(ranker, users, row, item, names=names, items=items, titles=titles).text()
        for row, item in enumerate(best)
        if item >= 0
    ]
    (out / "explanations.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def _write(path: Path, rows: Sequence[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
