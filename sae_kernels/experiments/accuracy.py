"""Accuracy kept, one command for all recommenders: the same SAE in each, over seeds, beside the published recipe."""

import csv
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .._need import need
from .._plots import MUTED, PALETTE, figure
from . import papers
from .grid import Bar, CellResult, GridConfig, run_grid
from .grid_page import FEW_DEAD, REFIT_NOTE, spread, table
from .report import STYLE, plot, section

FIGURES = ("base_ndcg", "kept", "fvu", "cosine", "norm_ratio", "l0", "dead_share")
OURS = ("topk", "topk-refit")
PUBLISHED = ("published-l2", "published-l2-refit", "published-cosine", "published-cosine-refit")


@dataclass(frozen=True)
class AccuracyConfig:
    """What is compared. data: a folder of ratings for ELSA and MultVAE (None: the simulation), the latter once for each
    of `latents`, the size of its embedding. sequences: a folder with a time order for SASRec, trained or with its
    published `weights`; without it SASRec is left out.
    """

    data: Path | None = None
    sequences: Path | None = None
    weights: Path | None = None
    latents: tuple[int, ...] = (64, 128, 200)
    seeds: tuple[int, ...] = (0, 1, 2)
    k: int = 32
    width: int = 8
    steps: int | None = None
    out: Path = Path("runs/accuracy")
    quiet: bool = False

    def grids(self) -> list[GridConfig]:
        """One grid per recommender, each in its folder of `out`. Raises ValueError naming what is out of range."""
        if self.weights is not None and self.sequences is None:
            raise ValueError("--weights are those of a SASRec: give --sequences too")
        if not self.latents or len(set(self.latents)) < len(self.latents):
            raise ValueError(f"--latents must name at least one size, each once, got {self.latents}")
        same = {"k": (self.k,), "width": (self.width,), "seeds": self.seeds, "steps": self.steps, "quiet": self.quiet}
        grids = [GridConfig("elsa", self.data, variants=OURS, out=self.out / "elsa", **same)]
        for d in self.latents:
            out = self.out / f"multvae-{d}"
            grids.append(GridConfig("multvae", self.data, d, variants=(*OURS, *PUBLISHED), out=out, **same))
        if self.sequences is not None:
            # lists of 10, as sequence models are scored
            given = {"weights": self.weights, "variants": OURS, "at": 10, "out": self.out / "sasrec"}
            grids.append(GridConfig("sasrec", self.sequences, **given, **same))
        return [grid.filled() for grid in grids]


@dataclass(frozen=True)
class Line:
    """One variant in one recommender: its cells over the seeds."""

    grid: GridConfig
    variant: str
    cells: list[CellResult]

    @property
    def name(self) -> str:
        return f"{self.grid.model.upper()} {self.grid.d}"

    @property
    def data(self) -> str:
        return self.grid.data.name if self.grid.data else "simulated"

    def values(self, figure: str) -> list[float]:
        return [getattr(cell, figure) for cell in self.cells]


def run_accuracy(config: AccuracyConfig) -> list[Line]:
    """Runs what config.out does not hold yet; accuracy.csv and results.html lie there, and a folder per recommender.

    Raises what run_grid raises.
    """
    grids, lines = config.grids(), []
    with Bar(config.quiet) as bar:
        for grid in grids:
            cells = run_grid(grid, bar)
            for variant in grid.variants:
                lines.append(Line(grid, variant, [cell for cell in cells if cell.variant == variant]))
    _write_csv(lines, config.out / "accuracy.csv")
    (config.out / "results.html").write_text(render(lines, config), encoding="utf-8")
    return lines


def _write_csv(lines: list[Line], path: Path) -> None:
    head = ["model", "data", "d", "variant", "at", "seeds"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*head, *(f"{name}_{part}" for name in FIGURES for part in ("mean", "sd"))])
        for line in lines:
            figures = [part for name in FIGURES for part in _moments(line.values(name))]
            grid = line.grid
            writer.writerow([grid.model, line.data, grid.d, line.variant, grid.at, len(line.cells), *figures])


def _moments(values: list[float]) -> tuple[float, float]:
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def render(lines: list[Line], config: AccuracyConfig) -> str:
    """The whole page as text."""
    script = need("plotly.offline", "the accuracy page", "demo").get_plotlyjs()
    title = "What a sparse autoencoder costs a recommender"
    seeds = f"{len(config.seeds)} seeds, mean ± standard deviation" if len(config.seeds) > 1 else "one seed"
    lead = f"{config.width} latents per dimension of the embedding, k = {config.k} of them active; {seeds}."
    body = [
        f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>",
        section(
            "Accuracy kept",
            "nDCG on held-out users with the SAE in place, as a share of nDCG without it; bars: standard deviation. "
            + REFIT_NOTE,
            plot(_figure(lines)),
        ),
        section(
            "In numbers",
            f"base: nDCG without an SAE, at 20, SASRec's at 10. FVU, cosine and norm = sum |x_hat| / sum |x|: on the "
            f"held-out users. Dead: fired on none of the rows drawn as in training; over {FEW_DEAD:.0%} is marked.",
            _table(lines),
        ),
        section("Beside the published figures", _published_note(), _published(config)),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><script>{script}</script></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _figure(lines: list[Line]) -> Any:
    made = figure(380, "the accuracy page", yaxis_title="accuracy kept")
    for place, variant in enumerate(dict.fromkeys(line.variant for line in lines)):
        here = [line for line in lines if line.variant == variant]
        means, spreads = zip(*(_moments(line.values("kept")) for line in here), strict=True)
        made.add_bar(
            name=variant,
            x=[line.name for line in here],
            y=means,
            error_y={"array": spreads, "visible": any(spreads), "thickness": 1.2},
            marker={"color": PALETTE[place % len(PALETTE)]},
        )
    made.update_layout(barmode="group")
    made.update_yaxes(tickformat=".0%")
    made.add_hline(y=1, line={"color": MUTED, "width": 1.2, "dash": "dot"})
    return made


def _table(lines: list[Line]) -> str:
    head = ["recommender", "data", "variant", "base", "kept", "FVU", "cosine", "norm", "L0", "dead", "seeds"]
    digits = {"base_ndcg": 4, "kept": 3, "fvu": 3, "cosine": 3, "norm_ratio": 2, "l0": 1}
    rows = []
    for line in lines:
        dead = spread([100 * share for share in line.values("dead_share")], 1) + " %"
        marked = f"<b>{dead}</b>" if fmean(line.values("dead_share")) > FEW_DEAD else dead
        figures = [spread(line.values(name), places) for name, places in digits.items()]
        words = [escape(text) for text in (line.name, line.data, line.variant)]
        rows.append([*words, *figures, marked, str(len(line.cells))])
    return table(head, rows, words=3)


def _published_note() -> str:
    return (
        "Relative nDCG@20 of TopK SAEs as published for this k and width (Spišák et al. 2026). The data sets, the "
        "sizes of the embeddings and the base models differ from ours: compare how it goes, not single cells."
    )


def _published(config: AccuracyConfig) -> str:
    rows = [
        [escape(line.model.upper()), line.data, line.loss, str(line.d), f"{line.kept[papers.K.index(config.k)]:.3f}"]
        for model in ("elsa", "multvae")
        for line in papers.published(model)
        if line.width == config.width and config.k in papers.K
    ]
    return table(["recommender", "data", "loss", "d", "kept"], rows, words=3)
