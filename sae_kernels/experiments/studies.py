"""The study over several runs or seeds: every run is made and studied once, then the figures with mean and spread."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from .. import _plots
from ..interpret import plots as concept_plots
from ..steer import SteeringRow, pareto_front
from ..steer import plots as steer_plots
from .demo import DemoConfig, run_demo
from .study import StudyConfig, run_digest, run_study
from .study_steering import LOSSES


@dataclass(frozen=True)
class StudiesConfig:
    """runs: folders that the demo has written; or none, and data, model and seeds: runs made in out / "seed-<seed>".

    out: where the summary goes, beside the runs that are made. study, demo: further options of StudyConfig and
    DemoConfig, such as {"users": 500} and {"steps": 100}.
    """

    out: Path
    runs: tuple[Path, ...] = ()
    data: Path | None = None
    model: str = "elsa"
    seeds: tuple[int, ...] = (0, 1, 2)
    study: dict[str, Any] = field(default_factory=dict)
    demo: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises ValueError naming what is out of range."""
        StudyConfig(self.out, **self.study).check()
        if len({Path(run).resolve() for run in self.runs}) < len(self.runs):
            raise ValueError(f"RUN must name each folder once, got {' '.join(map(str, self.runs))}")
        if not self.runs and (not self.seeds or len(set(self.seeds)) < len(self.seeds)):
            given = " ".join(map(str, self.seeds))
            raise ValueError(f"--seeds must name at least one value, each once, got {given}")


def run_studies(config: StudiesConfig) -> list[dict[str, Any]]:
    """Studies what is not studied yet, and writes summary.csv and summary.html; returns every run's figures.

    A run that was cut goes on, a finished one is left alone: the same command again does what is missing. A run that
    was made anew is studied anew. Raises ValueError for a run or a seed given twice, and as run_demo and run_study.
    """
    config.check()
    runs = config.runs or [_made(config, seed) for seed in config.seeds]
    found = [_studied(StudyConfig(run, **config.study)) for run in runs]
    config.out.mkdir(parents=True, exist_ok=True)
    readings, gains = _readings(found), _gains(found)
    _write_summary(readings, gains, config.out / "summary.csv")
    base, _ = _mean_and_spread([one["base_ndcg"] for one in found])
    pages = concept_plots.reading_pages(readings) + steer_plots.pages(_front(found), base, "spread over the runs")
    title = f"{', '.join(dict.fromkeys(one['data'] for one in found))}, {len(found)} runs: concepts and steering"
    _plots.write_page(pages, config.out / "summary.html", title)
    print(describe(found))
    print(f"summary: {config.out / 'summary.html'}")
    return found


def describe(found: Sequence[dict[str, Any]]) -> str:
    """The figures of all runs as mean ± standard deviation, and who holds the front where."""
    lines = [f"{len(found)} runs, mean ± standard deviation"]
    lines.append(f"{'best of each concept, by':<28}{'AUC':>15}{'held out':>15}{'over raw':>15}{'correlation':>15}"
                 f"{'held out':>15}{'over raw':>15}")  # fmt: skip
    for row in _readings(found):
        cells = (
            f"{_spread(row, f'{by}{suffix}'):>15}"
            for by in ("auc", "correlation")
            for suffix in ("", "_held_out", "_gain")
        )
        lines.append(f"{row['reading'] + ', ' + row['detector']:<28}" + "".join(cells))
    for row in _readings(found):
        if row["detector"] == "latents":
            lines.append(f"above the untrained SAE, {row['reading']}: {_spread(row, 'auc_above_untrained')} of the "
                         f"concepts by AUC, {_spread(row, 'correlation_above_untrained')} by correlation")  # fmt: skip
    lines.append(f"{'segment nDCG at a loss of':<28}" + "".join(f"{loss:>15.0%}" for loss in LOSSES))
    gains = _gains(found)
    for method in dict.fromkeys(row["method"] for row in gains):
        by = {row["loss"]: row for row in gains if row["method"] == method}
        cells = (f"{_spread(by[loss], 'gain', 2) + 'x' if loss in by else '-':>15}" for loss in LOSSES)
        lines.append(f"{method:<28}" + "".join(cells))
    for loss in LOSSES:
        here = sorted((row for row in gains if row["loss"] == loss), key=lambda row: -row["gain"])
        lines.append(f"at {loss:.0%}: {' > '.join(row['method'] for row in here)}")
    held = dict.fromkeys(row.method for row in pareto_front(_front(found)))
    lines.append(f"on the mean front: {', '.join(held)}")
    return "\n".join(lines)


def _made(config: StudiesConfig, seed: int) -> Path:
    """The run of a seed, trained unless it is there."""
    run = config.out / f"seed-{seed}"
    demo = DemoConfig(model=config.model, data=config.data, seed=seed, out=run, quiet=True, **config.demo)
    if not (run / "metrics.json").is_file():
        print(f"training {config.model}, seed {seed}", flush=True)
        run_demo(replace(demo, resume=(run / "run.json").is_file()))
    elif json.loads((run / "run.json").read_text()) != demo.filled().identity():
        raise ValueError(f"{run} holds another run than --data, --model and --seeds name; give another --out")
    return run


def _studied(config: StudyConfig) -> dict[str, Any]:
    path = config.folder / "study.json"
    if path.is_file():
        found = json.loads(path.read_text())
        if found["config"] == config.identity() and found.get("run") == run_digest(Path(config.run)):
            print(f"{config.run} is studied already", flush=True)
            return found
    print(f"studying {config.run}", flush=True)
    run_study(config)
    return json.loads(path.read_text())


def _readings(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as readings_table gives them, means over the runs, standard deviations as <figure>_spread."""
    keyed = [{(row["reading"], row["detector"]): row for row in one["readings"]} for one in found]
    shared = [key for key in keyed[0] if all(key in one for one in keyed)]
    return [_merged([one[key] for one in keyed], ("reading", "detector")) for key in shared]


def _gains(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as SteeringStudy.gains gives them, means over the runs with spread; where all runs reach the loss."""
    keyed = [{(row["method"], row["loss"]): row for row in one["gains"]} for one in found]
    shared = [key for key in keyed[0] if all(key in one for one in keyed)]
    return [_merged([one[key] for one in keyed], ("method", "loss")) for key in shared]


def _front(found: Sequence[dict[str, Any]]) -> list[SteeringRow]:
    """The steering table averaged over the runs; errors: of the mean over runs, where there are several."""
    figures = [f.name for f in fields(SteeringRow) if f.name not in ("method", "errors", "k", "strength")]
    keyed = [{(row["method"], row["strength"]): row for row in one["steering"]} for one in found]
    rows = []
    for method, strength in (key for key in keyed[0] if all(key in one for one in keyed)):
        here = [one[method, strength] for one in keyed]
        both = {name: _mean_and_spread([row[name] for row in here]) for name in figures}
        means = {name: mean for name, (mean, _) in both.items()}
        errors = {name: spread / len(here) ** 0.5 for name, (_, spread) in both.items() if len(here) > 1}
        rows.append(SteeringRow(strength=strength, method=method, k=here[0]["k"], errors=errors, **means))
    return rows


def _merged(rows: Sequence[dict[str, Any]], keys: tuple[str, ...]) -> dict[str, Any]:
    merged = {key: rows[0][key] for key in keys}
    for name in rows[0]:
        if name not in keys:
            merged[name], merged[f"{name}_spread"] = _mean_and_spread([row[name] for row in rows])
    return merged


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, 0 of one value; NaN where a run has none: it is shown, not skipped."""
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std()) if len(values) > 1 else 0.0


def _spread(row: dict[str, Any], name: str, digits: int = 3) -> str:
    return f"{row[name]:.{digits}f} ± {row[f'{name}_spread']:.{digits}f}"


def _write_summary(readings: list[dict[str, Any]], gains: list[dict[str, Any]], path: Path) -> None:
    """Long form: what, figure, mean, standard deviation."""
    label: dict[str, Callable[[dict], str]] = {
        "readings": lambda row: f"{row['reading']}, {row['detector']}",
        "gains": lambda row: f"{row['method']} at {row['loss']:.0%} loss",
    }
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "figure", "mean", "standard_deviation"])
        for kind, rows in (("readings", readings), ("gains", gains)):
            for row in rows:
                for name in (n for n in row if f"{n}_spread" in row):
                    writer.writerow([label[kind](row), name, row[name], row[f"{name}_spread"]])
