"""The grid: SAE variants x width x k x seeds on one recommender; a cell is a line of a CSV, so a cut run goes on."""

import csv
import io
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from .._need import need
from ..data import Interactions, leave_last_out
from ..nn import TopKSAE
from ..recommenders import SASRec
from . import stages
from .demo import DemoConfig
from .grid_page import write_grid_page
from .stages import Parts
from .variants import OURS, REFIT_SUFFIX, TRAINED, train_variant, trained_as


@dataclass(frozen=True)
class GridConfig:
    """What the grid runs on. What is None is filled in by model and data, as for the demo.

    data: a folder of a known layout, None for the demo's simulation. weights: a published SASRec state dict (.npz), in
    place of training one; all users are then those of its training, whose last item is the target. at: the length of
    the lists that are scored.
    """

    model: str = "elsa"
    data: Path | None = None
    d: int | None = None
    epochs: int | None = None
    weights: Path | None = None
    variants: tuple[str, ...] | None = None
    k: tuple[int, ...] = (8, 16, 32, 64)
    width: tuple[int, ...] = (2, 4, 8)
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    at: int = 20
    out: Path | None = None
    quiet: bool = False
    simulate: tuple[int, int, int] = (4000, 1500, 20)

    def filled(self) -> "GridConfig":
        """With defaults in place of None. Raises ValueError naming what is out of range."""
        if self.variants is None:
            published = () if self.model == "sasrec" else ("published-l2", "published-cosine")
            return replace(self, variants=("topk", "topk-refit", *published)).filled()
        for name in ("variants", "k", "width", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name} must name at least one value, each once, got {' '.join(map(str, values))}")
        named, also = {name: trained_as(name) for name in self.variants}, f"each also with {REFIT_SUFFIX}"
        unknown = [name for name, trained in named.items() if trained not in TRAINED]
        if unknown:
            raise ValueError(f"--variants must be among {', '.join(TRAINED)}, {also}; got {', '.join(unknown)}")
        if self.weights is not None and self.model != "sasrec":
            raise ValueError(f"--weights are those of a sasrec, got --model {self.model}")
        if self.model == "sasrec" and not set(named.values()) <= set(OURS):
            raise ValueError(f"--variants of a sasrec must be among {', '.join(OURS)}, {also}: others are not for it")
        if self.at < 1:
            raise ValueError(f"--at must be at least 1, got {self.at}")
        model = _published_sasrec(self.weights) if self.weights is not None else None
        d = self.d if model is None else model.d
        demo = DemoConfig(model=self.model, data=self.data, d=d, epochs=self.epochs, steps=self.steps, k=1).filled()
        config = replace(
            self, d=demo.d, epochs=demo.epochs, steps=demo.steps, out=self.out or Path(f"runs/grid-{self.model}")
        )
        for k, width in product(config.k, config.width):
            config.cell(width, k, 0)
        return config

    def cell(self, width: int, k: int, seed: int) -> DemoConfig:
        """One cell as the stages take it; ValueError where k is more than the latents."""
        return DemoConfig(
            model=self.model, data=self.data, d=self.d, epochs=self.epochs, steps=self.steps, k=k, width=width,
            seed=seed, simulate=self.simulate,
        ).filled()  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of a cell: a grid may grow by variants, widths, k and seeds, and by nothing else."""
        grown = ("variants", "k", "width", "seeds", "out", "quiet")
        kept = {name: value for name, value in asdict(self).items() if name not in grown}
        return json.loads(json.dumps(kept, default=str))


@dataclass(frozen=True)
class CellResult:
    """One line of cells.csv. kept: ndcg over base_ndcg; seconds: of this cell, without training where the SAE is the
    one of the cell before."""

    variant: str
    width: int
    k: int
    seed: int
    d: int
    base_ndcg: float
    base_recall: float
    ndcg: float
    recall: float
    kept: float
    fvu: float
    cosine: float
    norm_ratio: float
    l0: float
    dead_share: float
    steps: int
    seconds: float

    @property
    def place(self) -> tuple[str, int, int, int]:
        return self.variant, self.width, self.k, self.seed


def run_grid(config: GridConfig, bar: "Bar | None" = None) -> list[CellResult]:
    """Runs the cells that config.out does not hold yet and returns all; cells.csv and results.html lie in config.out.

    bar: one that is shared with other grids; without it the grid shows its own, unless quiet. Raises ValueError for
    options that do not go together or another run's folder, ImportError naming the extra.
    """
    need("safetensors", "the grid", "demo")
    need("plotly", "the grid's page", "demo")
    config = config.filled()
    # before anything is written: data that does not go with the model leaves no folder behind
    data = _data(config, config.seeds[0])
    _begin(config)
    wanted = list(product(config.seeds, config.variants, config.width, config.k))
    results = {one.place: one for one in read_cells(config.out / "cells.csv")}
    pending = [cell for cell in wanted if (*cell[1:], cell[0]) not in results]
    with nullcontext(bar) if bar is not None else Bar(config.quiet) as bar:
        bar.expect(len(pending) * config.steps)
        if len(pending) < len(wanted):
            bar.note(f"{len(wanted) - len(pending)} cells are done already, in {config.out}")
        for seed in config.seeds:
            todo = [cell for cell in pending if cell[0] == seed]
            if not todo:
                continue
            model, parts = _recommender(config, seed, bar)
            base = stages.ranking(model, parts, k=config.at)
            saes = Saes(config, model, parts, bar)
            # cells of one SAE after each other
            for _, variant, width, k in sorted(todo, key=lambda cell: (cell[2:], trained_as(cell[1]), cell[1])):
                one = _run_cell(config, saes, base, (variant, width, k, seed))
                results[one.place] = one
                _write_cells(results.values(), config.out / "cells.csv")
    chosen = [results[(*cell[1:], cell[0])] for cell in wanted]
    write_grid_page(chosen, config, data.describe())
    return chosen


def _begin(config: GridConfig) -> None:
    """Notes what this grid is; a folder that holds another one is not touched."""
    note = config.out / "grid.json"
    now = config.identity()
    if note.is_file():
        differing = stages.differences(json.loads(note.read_text()), now)
        if differing:
            raise ValueError(f"--out {config.out} holds another grid: {differing}; give another --out")
        return
    config.out.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(now, indent=2) + "\n")


def read_cells(path: Path) -> list[CellResult]:
    """The finished cells; none where there is no file. ValueError for a line that is no cell."""
    if not path.is_file():
        return []
    found = []
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                found.append(CellResult(**{field.name: field.type(row[field.name]) for field in fields(CellResult)}))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: not a cell of the grid ({error})") from None
    return found


def _write_cells(results: Iterable[CellResult], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(CellResult)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(one) for one in results)
    fresh = path.with_suffix(".new")
    fresh.write_text(text.getvalue())
    fresh.replace(path)


def _recommender(config: GridConfig, seed: int, bar: "Bar") -> tuple[nn.Module, Parts]:
    """The base model of one seed, trained unless an earlier run left it or --weights brings it."""
    cell, data = config.cell(config.width[0], config.k[0], seed), _data(config, seed)
    if config.weights is not None:
        model = _published_sasrec(config.weights)
        test = leave_last_out(data.histories())
        return model, Parts(data, test.inputs, test)
    parts = stages.split(data, cell)
    model, path = stages.new_recommender(parts, cell), config.out / f"recommender-{seed}.safetensors"
    if path.is_file():
        stages.restore_recommender(model, path)
    else:
        stages.train_recommender(model, parts, cell, bar.over(f"{config.model}, seed {seed}"))
        stages.save_recommender(model, path)
    return model, parts


def _data(config: GridConfig, seed: int) -> Interactions:
    """The interactions; ValueError where they do not go with the model or its weights."""
    data = stages.load_data(config.cell(config.width[0], config.k[0], seed))
    if config.model == "sasrec" and data.order is None:
        raise ValueError(f"{data.name} has no time order, which sasrec needs: take elsa or multvae")
    if config.weights is not None and (known := _published_sasrec(config.weights).n_items) != data.n_items:
        raise ValueError(f"--weights {config.weights} know {known} items, the data has {data.n_items}")
    return data


def _published_sasrec(path: Path) -> SASRec:
    if path.suffix != ".npz" or not path.is_file():
        raise FileNotFoundError(f"--weights: {path} is no .npz file")
    numpy = need("numpy", "reading --weights", "demo")
    return SASRec.from_state(dict(numpy.load(path, allow_pickle=False)))


class Saes:
    """The SAE of a cell, trained unless the last one asked for was the same: cells may differ in reading it alone."""

    def __init__(self, config: GridConfig, model: nn.Module, parts: Parts, bar: "Bar") -> None:
        self.config, self.model, self.parts, self.bar = config, model, parts, bar
        self._place, self._sae = None, None

    def get(self, variant: str, width: int, k: int, seed: int) -> TopKSAE:
        place = (trained_as(variant), width, k, seed)
        self.bar.say(f"{variant} {width}x k={k} seed {seed}")
        if place == self._place:
            self.bar.update(self.config.steps)
        else:
            cell = self.config.cell(width, k, seed)
            self._sae = train_variant(place[0], self.model, self.parts, cell, self.bar.update)
            self._place = place
        self._sae.refit = 0 if place[0] == variant else stages.REFIT
        return self._sae


def _run_cell(config: GridConfig, saes: Saes, base: dict[str, float], place: tuple) -> CellResult:
    variant, width, k, seed = place
    model, parts, started = saes.model, saes.parts, time.perf_counter()
    sae, cell = saes.get(*place), config.cell(width, k, seed)
    spliced = stages.ranking(model, parts, sae, k=config.at)
    figures = stages.reconstruction(model, sae, parts.test.inputs).compute()
    norm = stages.norm_ratio(model, sae, parts.test.inputs)
    trained = stages.reconstruction_as_trained(model, sae, parts, cell).compute()
    ndcg, recall = f"ndcg@{config.at}", f"recall@{config.at}"
    return CellResult(
        variant, width, k, seed, config.d, base[ndcg], base[recall], spliced[ndcg], spliced[recall],
        spliced[ndcg] / base[ndcg] if base[ndcg] else float("nan"),
        figures["fvu"], figures["cosine"], norm, figures["l0"], trained["dead_share"], config.steps,
        round(time.perf_counter() - started, 2),
    )  # fmt: skip


class Bar:
    """The one progress bar: steps of all cells that are left; the recommenders' own steps are added as they come."""

    def __init__(self, quiet: bool) -> None:
        self._bar = None
        if not quiet:
            tqdm = need("tqdm", "the progress bar (off with --quiet)", "demo").tqdm
            self._bar = tqdm(total=0, desc="grid", unit="step")

    def expect(self, steps: int) -> None:
        """So many more are to come."""
        if self._bar is not None:
            self._bar.total += steps
            self._bar.refresh()

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)

    def update(self, steps: int) -> None:
        if self._bar is not None:
            self._bar.update(steps)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_description(text)

    def over(self, text: str):
        """Wraps a range of steps, for a recommender's training."""

        def wrapped(steps: range) -> Iterator[int]:
            self.expect(len(steps))
            self.say(text)
            for step in steps:
                yield step
                self.update(1)

        return wrapped

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
