"""Plots of a concept map: concepts against the controls, selectivity, and how much of the latents is explained."""

from math import isfinite
from typing import Any

import torch

from .._plots import ACCENT, BASE, SAE, figure, known, plain
from .concept_map import ConceptMap
from .readings import DETECTORS
from .selectivity import explained_share, selectivity

BARS = 40
NAMES = {"sae": "best latent", "raw": "best raw dimension", "random": "untrained SAE"}
READINGS = {"activation": "activation", "lens": "logit lens", "audience": "audience"}
INK = "#1f2933"
COLOURS = {"sae": SAE, "raw": ACCENT, "random": BASE}


def concepts_figure(found: ConceptMap, by: str = "auc", bars: int = BARS) -> Any:
    """The best latent of every concept with its interval, beside the controls; the `bars` best concepts."""
    scores = found.baselines(by)
    order = scores["sae"].nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)[:bars].flip(0)
    names = [plain(found.names[c]) for c in order.tolist()]
    made = figure(90 + 21 * len(names), xaxis_title={"auc": "AUC", "correlation": "correlation"}[by])
    made.update_layout(margin={"l": 160, "t": 34})
    for name in ("raw", "random"):
        if name in scores:
            marker = {"color": COLOURS[name], "size": 7, "symbol": "diamond" if name == "raw" else "circle"}
            x = known(scores[name][order].tolist())
            made.add_scatter(x=x, y=names, mode="markers", marker=marker, name=NAMES[name])
    low, high = getattr(found, f"{by}_interval")[order].unbind(1)
    best = scores["sae"][order]
    up, down = ((end - start).clamp(min=0).nan_to_num(0).tolist() for start, end in ((best, high), (low, best)))
    bar = {"array": up, "arrayminus": down}
    style = {"type": "data", "symmetric": False, "thickness": 1.4, "width": 0, "color": SAE}
    marker = {"color": SAE, "size": 9}
    made.add_scatter(
        x=known(best.tolist()), y=names, mode="markers", marker=marker, name=NAMES["sae"], error_x={**style, **bar}
    )
    return made


def distributions_figure(found: ConceptMap, by: str = "correlation") -> Any:
    """How the best score is spread over the concepts, for the SAE and the controls, as cumulative curves."""
    made = figure(320, xaxis_title=f"{by} of the best detector", yaxis_title="share of the concepts at least so good")
    made.update_yaxes(tickformat=".0%", rangemode="tozero")
    for name, score in found.baselines(by).items():
        score = score[~score.isnan()].sort(descending=True).values
        share = torch.arange(1, len(score) + 1) / max(len(score), 1)
        line = {"color": COLOURS[name], "width": 2.2, "shape": "hv"}
        made.add_scatter(x=score.tolist(), y=share.tolist(), mode="lines", line=line, name=NAMES[name])
    return made


def selectivity_figure(found: ConceptMap) -> Any:
    """Relative decrease of entropy: latents over concepts, and concepts over latents."""
    made = figure(320, barmode="overlay", bargap=0.04, xaxis_title="decrease of entropy against the average")
    made.update_yaxes(title="share", tickformat=".0%")
    for mass, name, colour in (
        (found.mass.T, "latents over concepts", SAE),
        (found.mass, "concepts over latents", ACCENT),
    ):
        decrease = selectivity(mass).decrease
        made.add_histogram(
            x=decrease[~decrease.isnan()].tolist(),
            name=name,
            marker_color=colour,
            opacity=0.65,
            histnorm="probability",
            xbins={"start": -0.5, "end": 1.001, "size": 0.05},
        )
    return made


def explained_figure(found: ConceptMap, by: str = "correlation") -> Any:
    """The share of the firing latents that some concept explains at every threshold, beside the controls.

    A raw dimension may point either way.
    """
    low = {"auc": 0.5, "correlation": 0.0}[by]
    thresholds = torch.linspace(low, 1, 51).tolist()
    made = figure(320, xaxis_title=f"{by} with the best concept", yaxis_title="share of the firing latents")
    made.update_yaxes(tickformat=".0%", rangemode="tozero")
    for name, scores in (("sae", found.scores), ("raw", found.raw), ("random", found.random)):
        if scores is not None:
            label = {"sae": "SAE", "raw": "raw dimensions", "random": "untrained SAE"}[name]
            line = {"color": COLOURS[name], "width": 2.2}
            share = explained_share(scores, thresholds, by, either_way=name == "raw")
            made.add_scatter(x=thresholds, y=share, line=line, mode="lines", name=label)
    return made


def readings_figure(table: list[dict], by: str = "auc") -> Any:
    """Mean best score of every reading and detector, from rows as readings_table gives them; dots: held out.

    A row may hold <by>_spread, a standard deviation over runs, for the bars.
    """
    low, name = {"auc": (0.5, "AUC"), "correlation": (0.0, "correlation")}[by]
    made = figure(320, barmode="group", yaxis_title=f"mean {name} of the best detector")
    made.update_yaxes(range=[low, None])
    for place, detector in enumerate(DETECTORS):
        rows = [row for row in table if row["detector"] == detector]
        names = [READINGS[row["reading"]] for row in rows]
        errors = [error if isfinite(error) else 0 for error in (row.get(f"{by}_spread", 0) for row in rows)]
        made.add_bar(
            x=names, y=known(row[by] for row in rows), name=detector, marker_color=(SAE, ACCENT, BASE)[place],
            offsetgroup=place, error_y={"array": errors, "visible": any(errors), "color": INK, "thickness": 1.2},
            text=[f"{row[by]:.3f}" if isfinite(row[by]) else "" for row in rows], textposition="outside",
        )  # fmt: skip
        made.add_scatter(
            x=names, y=known(row[f"{by}_held_out"] for row in rows), mode="markers", offsetgroup=place,
            showlegend=not place, name="chosen and scored on different items",
            marker={"color": INK, "size": 8, "symbol": "line-ew-open"},
        )  # fmt: skip
    made.update_layout(scattermode="group")
    return made


def reading_pages(table: list[dict]) -> list[tuple[str, str, Any]]:
    """(heading, note, figure) of both scores of the readings; none without rows."""
    note = (
        "Activation: the item as a history of one, silent in most latents. Lens: what a unit of the latent adds to the "
        "item's score. Audience: mean activation of the users who have the item. Raw dimensions may point either way."
    )
    headings = {"auc": "AUC in three readings", "correlation": "Correlation in three readings"}
    return [(heading, note, readings_figure(table, by)) for by, heading in headings.items() if table]


def pages(found: ConceptMap, readings: list[dict] | None = None) -> list[tuple[str, str, Any]]:
    """(heading, note, figure) of all of them, for `write_page`; readings: as readings_table gives them."""
    controls = "The controls are what picking the best detector is worth alone."

    def note(by: str) -> str:
        drawn = not bool(getattr(found, f"{by}_interval").isnan().all())
        return "Bars: 95 % bootstrap intervals over items. " * drawn + controls

    return [
        *reading_pages(readings or []),
        ("Concepts by AUC", note("auc"), concepts_figure(found, "auc")),
        ("Concepts by correlation", note("correlation"), concepts_figure(found, "correlation")),
        ("Best detectors", "One point per concept, sorted.", distributions_figure(found)),
        ("Explained latents", "Latents whose best concept reaches a correlation.", explained_figure(found)),
        ("Selectivity", "1: all on one; 0: as spread as the average.", selectivity_figure(found)),
    ]
