"""The demo: a recommender, a SAE in it, what that costs, what the latents mean, and what steering by them does."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from .._info import info
from ..nn import TopKSAE
from ..train.checkpoint import check_replaceable, need
from . import findings, stages
from .report import write_report
from .stages import RECIPES, K, Parts

SHOWN = 10  # concepts in the printed table


@dataclass(frozen=True)
class DemoConfig:
    """What the demo runs on. What is None is filled in by model and data.

    data: a folder of a known layout; or interactions, a file, with the names of its columns; neither: a simulation of
    `simulate` = (users, items, concepts). width: latents per dimension of the embedding.
    """

    model: str = "elsa"
    data: Path | None = None
    interactions: Path | None = None
    user_col: str | None = None
    item_col: str | None = None
    rating_col: str | None = None
    time_col: str | None = None
    min_rating: float | None = None
    d: int | None = None
    epochs: int | None = None
    width: int | None = None
    k: int | None = None
    steps: int | None = None
    normalize: str = "standardize"
    refit: int = stages.REFIT
    seed: int = 0
    out: Path | None = None
    resume: bool = False
    quiet: bool = False
    simulate: tuple[int, int, int] = (4000, 1500, 20)

    @property
    def real(self) -> bool:
        return self.data is not None or self.interactions is not None

    def filled(self) -> "DemoConfig":
        """With defaults in place of None. Raises ValueError naming what is out of range."""
        if self.model not in RECIPES:
            raise ValueError(f"--model must be one of {', '.join(RECIPES)}, got {self.model!r}")
        recipe, real = RECIPES[self.model], int(self.real)
        config = replace(
            self,
            d=recipe.d[real] if self.d is None else self.d,
            epochs=recipe.epochs[real] if self.epochs is None else self.epochs,
            width=(4, 8)[real] if self.width is None else self.width,
            k=(16, 32)[real] if self.k is None else self.k,
            steps=(2000, 6000)[real] if self.steps is None else self.steps,
            out=Path(f"runs/demo-{self.model}") if self.out is None else Path(self.out),
        )
        for name in ("d", "epochs", "width", "k", "steps"):
            if getattr(config, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(config, name)}")
        if config.refit < 0:
            raise ValueError(f"--refit must be at least 0, got {config.refit}")
        if config.k > config.width * config.d:
            raise ValueError(
                f"--k {config.k} is more than the {config.width * config.d} latents of --width {config.width}"
            )
        return config

    def identity(self) -> dict[str, Any]:
        """What decides the numbers, as JSON knows it."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("out", "resume", "quiet")}
        return json.loads(json.dumps(kept, default=str))


@dataclass
class Run:
    """A run under way: where it says what it does, and how long each stage took."""

    config: DemoConfig
    seconds: dict[str, float] = field(default_factory=dict)

    def say(self, text: str) -> None:
        if not self.config.quiet:
            print(text, flush=True)

    @contextmanager
    def stage(self, name: str):
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 2)

    def bar(self, label: str) -> Callable[[Iterable[int]], Iterable[int]] | None:
        if self.config.quiet:
            return None
        tqdm = need("tqdm", "the progress bar (off with --quiet)", "demo").tqdm
        return lambda steps: tqdm(steps, desc=label, unit="step")


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Runs all stages and returns their figures; metrics.json, report.html and the checkpoint lie in config.out.

    Raises ValueError or FileNotFoundError for data and options that do not go together, ImportError naming the extra.
    """
    need("safetensors", "the demo", "demo")
    need("plotly", "the demo's report", "demo")
    config = config.filled()
    run, started = Run(config), time.perf_counter()
    with run.stage("data"):
        data = stages.load_data(config)
        parts = stages.split(data, config)
    run.say(data.describe())
    run.say(
        f"{len(parts.train):,} users to train on, {len(parts.test.inputs):,} held out "
        f"({parts.test.dropped} more had too few items)"
    )
    _begin(config)
    model = _recommender(run, parts)
    sae, history = _train_sae(run, model, parts)
    results = _measure(run, model, sae, parts)
    results.update(config=config.identity(), data=data.describe(), history=history, **_backend())
    results["stage_seconds"] = run.seconds
    results["seconds"] = round(time.perf_counter() - started, 2)
    (config.out / "metrics.json").write_text(json.dumps(_metrics(results), indent=2) + "\n")
    write_report(results, config.out / "report.html")
    _print(run, results)
    return results


def _begin(config: DemoConfig) -> None:
    """Notes what this run is; a resumed one must be the same."""
    note = config.out / "run.json"
    if config.resume:
        if not note.is_file():
            raise FileNotFoundError(f"--resume: {config.out} holds no run (no run.json)")
        then, now = json.loads(note.read_text()), config.identity()
        differing = stages.differences(then, now)
        if differing:
            raise ValueError(f"--resume: this run is not the one in {config.out}: {differing}")
        return
    config.out.mkdir(parents=True, exist_ok=True)
    # what an older run left would be taken for this one's
    for name in ("recommender.safetensors", "metrics.json", "report.html"):
        (config.out / name).unlink(missing_ok=True)
    if (config.out / "sae").exists():
        check_replaceable(config.out / "sae")
        shutil.rmtree(config.out / "sae")
    note.write_text(json.dumps(config.identity(), indent=2) + "\n")


def _recommender(run: Run, parts: Parts) -> nn.Module:
    config = run.config
    model, path = stages.new_recommender(parts, config), config.out / "recommender.safetensors"
    with run.stage("recommender"):
        if config.resume and path.is_file():
            stages.restore_recommender(model, path)
            run.say(f"recommender taken from {path}")
        else:
            stages.train_recommender(model, parts, config, run.bar(config.model))
            stages.save_recommender(model, path)
    return model


def _train_sae(run: Run, model: nn.Module, parts: Parts) -> tuple[TopKSAE, list[dict[str, float]]]:
    config = run.config
    sae, path = stages.new_sae(model, parts, config, refit=config.refit), config.out / "sae"
    with run.stage("sae"):
        result = stages.train_sae(
            sae,
            model,
            parts,
            config,
            log_every=max(1, config.steps // 100),
            progress=not config.quiet,
            checkpoint=path,
            checkpoint_every=max(1, config.steps // 4),
            # a run that was cut before the first checkpoint starts this stage anew
            resume=config.resume and (path / "config.json").is_file(),
        )
    return sae.eval(), result.history


def _measure(run: Run, model: nn.Module, sae: TopKSAE, parts: Parts) -> dict[str, Any]:
    config = run.config
    results: dict[str, Any] = {}
    with run.stage("evaluation"):
        held_out = stages.reconstruction(model, sae, parts.test.inputs).compute()
        trained = stages.reconstruction_as_trained(model, sae, parts, config)
        base, spliced = stages.ranking(model, parts), stages.ranking(model, parts, sae)
    for name in base:
        results[f"base_{name}"], results[f"sae_{name}"] = base[name], spliced[name]
    results.update({name: held_out[name] for name in ("fvu", "cosine", "l0")})
    # a tenth of the users is too few to call a rare latent dead
    results["dead_share"] = trained.compute()["dead_share"]
    results["d_sae"], results["counted_rows"], results["held_out_rows"] = sae.d_sae, trained.rows, held_out["rows"]
    results["density"] = (trained.counts.double() / trained.rows).tolist()
    with run.stage("concepts"):
        found = findings.interpret(model, sae, parts, trained.counts)
    with run.stage("steering"):
        found["steering"] = findings.steer(model, sae, parts, found)
        found["steering_mean"] = findings.average_steering(found["steering"]) if found["steering"] else []
    found.pop("latent_items", None)
    return {**results, **found}


def _backend() -> dict[str, Any]:
    facts = info()
    return {"backend": facts["backend"], "instruction_set": facts["instruction_set"], "environment": facts}


def _metrics(results: dict[str, Any]) -> dict[str, Any]:
    """What goes to metrics.json: all figures, without the curves and lists that only the report draws."""
    return _as_json({name: value for name, value in results.items() if name not in ("history", "density", "latents")})


def _as_json(value: Any) -> Any:
    """NaN and Inf, which JSON does not know, as null."""
    if isinstance(value, dict):
        return {name: _as_json(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_as_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(run: Run, results: dict[str, Any]) -> None:
    lines = ["", f"{'':<12}{'base':>9}{'with SAE':>11}{'kept':>9}"]
    for name in (f"ndcg@{K}", f"recall@{K}"):
        base, spliced = results[f"base_{name}"], results[f"sae_{name}"]
        label = name.replace("ndcg", "nDCG").replace("recall", "Recall")
        kept = f"{spliced / base:>8.1%}" if base else "-"
        lines.append(f"{label:<12}{base:>9.4f}{spliced:>11.4f}{kept:>9}")
    lines.append(
        f"FVU {results['fvu']:.4f}   cosine {results['cosine']:.4f}   L0 {results['l0']:.1f}   "
        f"dead {results['dead_share']:.2%} of {results['d_sae']:,} latents"
    )
    run.say("\n".join([*lines, *_concept_lines(results), *_steering_lines(results)]))
    isa = f" ({results['instruction_set']})" if results["instruction_set"] else ""
    run.say(f"\nbackend: {results['backend']}{isa}; {results['seconds']:.0f} s in all")
    run.say(f"report: {run.config.out / 'report.html'}")


def _concept_lines(results: dict[str, Any]) -> list[str]:
    rows = sorted(results["concepts"], key=lambda row: -row["items"])[:SHOWN]
    if not rows:
        return ["", "no named concepts in this data: the report lists latents by their top items"]
    lines = [
        "",
        f"best latent for each of the {len(rows)} largest concepts (mean AUC of all {len(results['concepts'])}: "
        f"{results['mean_auc']:.3f}; untrained SAE {results['mean_auc_untrained']:.3f}, "
        f"best raw dimension {results['mean_auc_raw']:.3f})",
        f"{'concept':<20}{'items':>7}{'latent':>8}{'AUC':>7}{'precision':>11}{'recall':>8}  fires most on",
    ]
    for row in rows:
        titles = "; ".join(title[:32] for title in row["examples"][:2])
        lines.append(
            f"{row['concept'][:19]:<20}{row['items']:>7,}{row['latent']:>8}{row['auc']:>7.3f}{row['precision']:>11.3f}"
            f"{row['recall']:>8.3f}  {titles}"
        )
    return lines


def _steering_lines(results: dict[str, Any]) -> list[str]:
    rows = results["steering"]
    if not rows:
        return []
    names = list(dict.fromkeys(row["concept"] for row in rows))
    lines = ["", f"steering, mean over {', '.join(names)}", f"{'strength':<10}{'share of top-20':>16}{'nDCG@20':>10}"]
    for row in results["steering_mean"]:
        lines.append(f"{row['strength']:<10}{row['concept_share']:>15.1%}{row['ndcg']:>11.4f}")
    return lines
