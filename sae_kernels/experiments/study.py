"""What the latents of a demo run mean, what they explain, and what steering by them does, as tables and pages."""

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _plots
from ..data import Concepts
from ..interpret import (
    ConceptMap,
    Reading,
    concept_map,
    concept_readings,
    concept_selectivity,
    explain,
    item_codes,
    latent_table,
    name_latents,
    readings_table,
)
from ..interpret import plots as concept_plots
from ..nn import TopKSAE
from ..recommenders import SASRec
from ..steer import STRENGTHS, SteeredRanker, Users
from ..train import load_sae
from . import stages
from .demo import DemoConfig
from .stages import Parts
from .study_steering import SteeringStudy, study_steering

SHOWN = ("auc", "auc_held_out", "auc_gain", "correlation", "correlation_held_out", "correlation_gain")


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

    @property
    def folder(self) -> Path:
        return Path(self.run) / "study" if self.out is None else Path(self.out)

    def check(self) -> None:
        """Raises ValueError naming what is out of range."""
        for name, least in (("users", 1), ("explained", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if self.resamples < 0 or self.resamples == 1:
            raise ValueError(f"--resamples must be 0 or at least 2, got {self.resamples}")
        if not 0 <= self.untagged < 1:
            raise ValueError(f"--untagged must be in [0, 1), got {self.untagged}")
        if 0.0 not in self.strengths:
            raise ValueError(f"strengths must hold 0, without steering, got {self.strengths}")

    def identity(self) -> dict[str, Any]:
        """What decides the figures besides the run, as JSON knows it."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("run", "out")}
        return json.loads(json.dumps(kept))


@dataclass(frozen=True)
class Study:
    """What run_study found in one run."""

    found: ConceptMap
    readings: list[Reading]
    steering: SteeringStudy

    def figures(self) -> dict[str, Any]:
        """What studies of several runs are compared by."""
        table = [{name: value for name, value in vars(row).items()} for row in self.steering.table]
        return {
            "map": self.found.summary(),
            "readings": readings_table(self.readings),
            "gains": self.steering.gains(),
            "steering": table,
            "steering_users": self.steering.users,
            "base_ndcg": self.steering.base.ndcg,
            "chosen": self.steering.chosen,
        }


def run_study(config: StudyConfig) -> Study:
    """Writes concepts, latents and steering as CSV and HTML, explanations.txt, and study.json with the main figures.

    Prints what each file says. Raises FileNotFoundError where the folder holds no run, ValueError for a run without
    concepts.
    """
    config.check()
    out = config.folder
    model, sae, parts = load_run(Path(config.run))
    digest = run_digest(Path(config.run))
    told = torch.rand(parts.data.n_items, generator=torch.Generator().manual_seed(0)) >= config.untagged
    *_, items, x = stages.coded_items(model, sae, parts)
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.json").unlink(missing_ok=True)
    untagged = int((~parts.data.concepts.labels.any(1)).sum())
    print(f"{untagged:,} of {parts.data.n_items:,} items have no concept")
    found, readings = _interpret(model, sae, parts, told, (items, x), config)
    titles = parts.data.item_titles or [str(item) for item in parts.data.item_ids]
    _write_concepts(found, readings, titles, parts.data.name, out)
    steering = study_steering(
        model, sae, parts, found, told, (items, x),
        users=config.users, strengths=config.strengths, resamples=config.resamples,
    )  # fmt: skip
    print(steering.describe())
    _write(out / "steering.csv", steering.rows())
    _write(out / "gains.csv", steering.gains())
    _plots.write_page(steering.pages(), out / "steering.html", f"{parts.data.name}: steering")
    if config.explained:
        _explanations(model, sae, parts, found, titles, config, out)
    study = Study(found, readings, steering)
    note = {"config": config.identity(), "run": digest, "data": parts.data.name, **study.figures()}
    (out / "study.json").write_text(json.dumps(note, indent=1) + "\n")
    print(f"tables and pages: {out}")
    return study


def load_run(run: Path) -> tuple[nn.Module, TopKSAE, Parts]:
    """The recommender, the SAE and the data of a folder that the demo has written."""
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


def run_digest(run: Path) -> str:
    """Of the files that load_run reads: another one after the demo has run anew into the folder."""
    found = hashlib.sha256()
    for name in ("run.json", "recommender.safetensors", "sae/config.json", "sae/model.safetensors"):
        found.update(hashlib.sha256((run / name).read_bytes()).digest())
    return found.hexdigest()


def _interpret(
    model: nn.Module, sae: TopKSAE, parts: Parts, told: Tensor, embedded: tuple[Tensor, Tensor], config: StudyConfig
) -> tuple[ConceptMap, list[Reading]]:
    """The map and the readings from the items whose tags are told [n_items] bool."""
    items, x = embedded
    kept, concepts = told[items], parts.data.concepts
    ranker = SteeredRanker(model, sae)
    # the lens asks for all items: those that are not told have no tag
    shown = Concepts(concepts.names, concepts.labels & told.unsqueeze(1))
    options = {"items": items[kept], "head": ranker.head.items if ranker.head.linear else None}
    found = concept_map(x[kept], sae, shown, resamples=config.resamples, **options)
    users = (ranker.encode(parts.train).x, parts.train)
    return found, concept_readings(x[kept], sae, shown, users=users, **options)


def _write_concepts(found: ConceptMap, readings: list[Reading], titles: Sequence[str], name: str, out: Path) -> None:
    print(found.describe())
    columns = {
        f"{one.reading}_{figure}": getattr(one, figure).tolist()
        for one in readings
        if one.detector == "latents" and one.reading != "activation"
        for figure in ("latent", "auc", "correlation")
    }
    selective = {row.pop("concept"): row for row in concept_selectivity(found)}
    _write(
        out / "concepts.csv",
        [
            {**row, **{key: column[place] for key, column in columns.items()}, **selective[row["concept"]]}
            for place, row in enumerate(found.table())
        ],
    )
    latents = latent_table(found, titles)
    _write(out / "latents.csv", [{**row, "examples": "; ".join(t for t, _ in row["examples"])} for row in latents])
    table = readings_table(readings)
    _write(out / "readings.csv", table)
    _plots.write_page(concept_plots.pages(found, table), out / "concepts.html", f"{name}: concepts and latents")
    print(f"{'best of each concept, by':<28}" + "".join(f"{name.replace('correlation', 'corr'):>15}" for name in SHOWN))
    for row in table:
        print(f"{row['reading'] + ', ' + row['detector']:<28}" + "".join(f"{row[name]:>15.3f}" for name in SHOWN))
    for figure, value in found.summary().items():
        print(f"  {figure:<28}{value:>10,.4g}")


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
