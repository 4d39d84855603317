"""Plots of compared steering methods: what is gained against what is lost, and every figure over the strength."""

from collections.abc import Sequence
from typing import Any

from .._plots import MUTED, PALETTE, faded, figure, plain
from .evaluate import SteeringRow, pareto_front

BAND = 1.96  # standard errors to either side: 95 %
FIGURES = {
    "ndcg": "personal nDCG",
    "segment_ndcg": "segment nDCG",
    "recall": "personal recall",
    "segment_recall": "segment recall",
    "concept_share": "share of the concept in the list",
    "diversity": "diversity within a list",
    "novelty": "novelty, bits",
    "coverage": "coverage of the catalogue",
    "gini": "Gini of exposure",
}
DASHES = ("solid", "dash", "dot", "dashdot")


def front_figure(rows: Sequence[SteeringRow], base: float | None = None, loss: float = 0.05) -> Any:
    """Personal against segment nDCG, a line per method, rings on the Pareto front, a line at (1 - loss) * base."""
    made = figure(460, xaxis_title=FIGURES["ndcg"], yaxis_title=FIGURES["segment_ndcg"])
    for place, (name, here) in enumerate(_by_method(rows).items()):
        made.add_scatter(
            name=plain(name),
            x=[row.ndcg for row in here],
            y=[row.segment_ndcg for row in here],
            customdata=[row.strength for row in here],
            mode="lines+markers",
            line={"color": PALETTE[place % len(PALETTE)], "width": 2, "dash": DASHES[place // len(PALETTE) % 4]},
            hovertemplate="strength %{customdata}: personal %{x:.4f}, segment %{y:.4f}",
        )
    front = pareto_front(rows)
    made.add_scatter(
        name="Pareto front",
        x=[row.ndcg for row in front],
        y=[row.segment_ndcg for row in front],
        customdata=[f"{plain(row.method)}, {row.strength}" for row in front],
        mode="markers",
        marker={"size": 12, "symbol": "circle-open", "color": "#1f2933", "line": {"width": 1.5}},
        hovertemplate="%{customdata}<extra>Pareto front</extra>",
    )
    if base is not None:
        made.add_vline(
            x=(1 - loss) * base,
            line={"color": MUTED, "width": 1.2, "dash": "dot"},
            annotation_text=f"{loss:.0%} lost",
            annotation_font={"color": MUTED, "size": 12},
        )
    return made


def curve_figure(rows: Sequence[SteeringRow], key: str) -> Any:
    """One figure over the strength, a line per method with its band of 95 %."""
    if key not in FIGURES:
        raise ValueError(f"curve_figure: key must be one of {', '.join(FIGURES)}, got {key!r}")
    made = figure(300, xaxis_title="strength", yaxis_title=FIGURES[key])
    for place, (method, here) in enumerate(_by_method(rows).items()):
        name, errors = plain(method), _errors(here, key)
        colour = PALETTE[place % len(PALETTE)]
        x, y = [row.strength for row in here], [getattr(row, key) for row in here]
        if errors is not None:
            outline = [v + e for v, e in zip(y, errors, strict=True)]
            outline += [v - e for v, e in reversed(list(zip(y, errors, strict=True)))]
            band = {"fill": "toself", "fillcolor": faded(colour, 0.15), "line": {"width": 0}, "mode": "lines"}
            made.add_scatter(x=x + x[::-1], y=outline, showlegend=False, hoverinfo="skip", name=name, **band)
        line = {"color": colour, "width": 2, "dash": DASHES[place // len(PALETTE) % 4]}
        made.add_scatter(x=x, y=y, name=name, mode="lines+markers", line=line)
    return made


def pages(
    rows: Sequence[SteeringRow], base: float | None = None, bands: str = "bootstrap over users"
) -> list[tuple[str, str, Any]]:
    """(heading, note, figure) of the front and of every figure that the rows have, for `write_page`.

    bands: what the errors of the rows come from.
    """
    held = ", ".join(dict.fromkeys(row.method for row in pareto_front(rows)))
    note = f"Up and to the right is better. Rings: no measured point beats these, which are of: {held}."
    found = [("What is gained and what is lost", note, front_figure(rows, base))]
    for key, name in FIGURES.items():
        if any(getattr(row, key) == getattr(row, key) for row in rows):
            drawn = any(_errors(here, key) is not None for here in _by_method(rows).values())
            found.append((name[0].upper() + name[1:], f"Bands: 95 %, {bands}." * drawn, curve_figure(rows, key)))
    return found


def _errors(rows: Sequence[SteeringRow], key: str) -> list[float] | None:
    """Half the height of the band at every row of a method; None where a row has no error."""
    errors = [BAND * row.errors.get(key, float("nan")) for row in rows]
    return errors if all(error == error for error in errors) else None


def _by_method(rows: Sequence[SteeringRow]) -> dict[str, list[SteeringRow]]:
    found: dict[str, list[SteeringRow]] = {}
    for row in rows:
        found.setdefault(row.method, []).append(row)
    return found
