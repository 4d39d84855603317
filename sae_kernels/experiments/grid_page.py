"""results.html of a grid: what every variant keeps of the accuracy, beside the published figures."""

from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from .._need import need
from .._plots import MUTED, PALETTE, figure
from . import papers
from .report import STYLE, plot, section
from .variants import REFIT_SUFFIX

if TYPE_CHECKING:
    from .grid import CellResult, GridConfig

FEW_DEAD = 0.02
REFIT_NOTE = (
    "A variant that ends in -refit is the same SAE with the same latents chosen, but their values are moved towards "
    "the least-squares fit of the embedding, since an encoder misjudges latents that overlap."
)


def write_grid_page(results: list["CellResult"], config: "GridConfig", data: str) -> None:
    """Writes config.out / results.html. Needs plotly, whose JavaScript goes into the page once."""
    (config.out / "results.html").write_text(render(results, config, data), encoding="utf-8")


def render(results: list["CellResult"], config: "GridConfig", data: str) -> str:
    """The whole page as text."""
    script = need("plotly.offline", "the grid's page", "demo").get_plotlyjs()
    title = f"What a sparse autoencoder costs {config.model.upper()}"
    bases = [one.base_ndcg for one in {one.seed: one for one in results}.values()]
    seeds = "one seed" if len(bases) == 1 else f"{len(bases)} seeds, mean ± standard deviation"
    lead = (
        f"{data}. Embeddings of size {config.d}, {config.steps:,} training steps per SAE, {seeds}. "
        f"nDCG@{config.at} without an SAE: {spread(bases, 4)}."
    )
    body = [
        f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>",
        section(
            "Accuracy kept",
            f"nDCG@{config.at} on held-out users with the SAE in place, as a share of nDCG@{config.at} without it. "
            + REFIT_NOTE * any(one.variant.endswith(REFIT_SUFFIX) for one in results),
            plot(_kept_figure(results)),
        ),
        section(
            "Direction is not enough",
            "Each point is a cell: the mean cosine of embedding and reconstruction, and the accuracy that is kept. A "
            "cosine does not see the scale, a nonlinear decoder does; norm, in the table, is sum |x_hat| / sum |x|.",
            plot(_cosine_figure(results)),
        ),
        section("All cells", f"Dead: fired on none of the rows drawn as in training; over {FEW_DEAD:.0%} is marked.",
                _table(results)),
        _published_section(results, config),
    ]  # fmt: skip
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><script>{script}</script></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def spread(values: list[float], digits: int) -> str:
    """The mean, with ± the standard deviation where there are several values."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def _groups(results: list["CellResult"]) -> dict[tuple[str, int, int], list["CellResult"]]:
    """(variant, width, k) -> its cells over the seeds, in the order of the grid."""
    groups: dict[tuple[str, int, int], list[CellResult]] = {}
    for one in sorted(results, key=lambda one: (one.variant, one.width, one.k, one.seed)):
        groups.setdefault((one.variant, one.width, one.k), []).append(one)
    return groups


def _kept_figure(results: list["CellResult"]) -> Any:
    made = figure(420, "the grid's page", xaxis_title="k, active latents", yaxis_title="accuracy kept")
    groups, variants = _groups(results), list(dict.fromkeys(one.variant for one in results))
    widths = sorted({one.width for one in results})
    dashes = ("solid", "dash", "dot", "longdash", "dashdot", "longdashdot")  # from the widest on
    for variant in variants:
        for place, width in enumerate(widths):
            cells = [(k, group) for (name, w, k), group in groups.items() if (name, w) == (variant, width)]
            errors = [stdev([one.kept for one in group]) if len(group) > 1 else 0 for _, group in cells]
            colour, symbol = _look(variants.index(variant))
            made.add_scatter(
                name=f"{variant} {width}x",
                x=[k for k, _ in cells],
                y=[fmean(one.kept for one in group) for _, group in cells],
                error_y={"array": errors, "visible": any(errors), "thickness": 1.2},
                mode="lines+markers",
                line={"color": colour, "width": 2, "dash": dashes[(len(widths) - 1 - place) % len(dashes)]},
                marker={"symbol": symbol},
            )
    ticks = sorted({one.k for one in results})
    made.update_xaxes(type="log", tickvals=ticks, ticktext=[str(k) for k in ticks])
    made.update_yaxes(tickformat=".0%")
    made.update_layout(legend={"orientation": "v", "x": 1.01, "xanchor": "left", "y": 1, "yanchor": "top"})
    made.add_hline(y=1, line={"color": MUTED, "width": 1.2, "dash": "dot"})
    return made


def _look(place: int) -> tuple[str, str]:
    """The colour and the marker of a variant; past the last colour, the colours again with the next marker."""
    again, colour = divmod(place, len(PALETTE))
    return PALETTE[colour], ("circle", "diamond", "square")[again % 3]


def _cosine_figure(results: list["CellResult"]) -> Any:
    made = figure(360, "the grid's page", xaxis_title="mean cosine", yaxis_title="accuracy kept")
    made.update_yaxes(tickformat=".0%")
    for place, variant in enumerate(dict.fromkeys(one.variant for one in results)):
        here = [one for one in results if one.variant == variant]
        colour, symbol = _look(place)
        made.add_scatter(
            name=variant,
            x=[one.cosine for one in here],
            y=[one.kept for one in here],
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 9, "opacity": 0.8},
            text=[f"{one.width}x, k = {one.k}, seed {one.seed}" for one in here],
            hovertemplate="%{text}: cosine %{x:.3f}, kept %{y:.1%}<extra></extra>",
        )
    return made


def _table(results: list["CellResult"]) -> str:
    head = ["variant", "width", "k", "kept", "nDCG", "Recall", "FVU", "cosine", "norm", "L0", "dead", "seeds"]
    body = []
    for (variant, width, k), group in _groups(results).items():
        columns = [
            spread([getattr(one, name) for one in group], digits)
            for name, digits in (
                ("kept", 3),
                ("ndcg", 4),
                ("recall", 4),
                ("fvu", 4),
                ("cosine", 4),
                ("norm_ratio", 2),
                ("l0", 1),
            )
        ]
        dead = fmean(one.dead_share for one in group)
        shown = f"<b>{dead:.2%}</b>" if dead > FEW_DEAD else f"{dead:.2%}"
        body.append([escape(variant), f"{width}x", str(k), *columns, shown, str(len(group))])
    return table(head, body, words=1)


def table(head: list[str], rows: list[list[str]], words: int) -> str:
    """An HTML table whose first `words` columns are text and whose others are numbers; cells are HTML already."""
    kinds = ["" if place < words else " class='n'" for place in range(len(head))]
    top = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, head, strict=True))
    lines = ["".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class='scroll'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _published_section(results: list["CellResult"], config: "GridConfig") -> str:
    lines = papers.published(config.model)
    title = "Beside the published figures"
    if not lines:
        note = "The papers publish no accuracy of this recommender with and without an SAE."
        return section(title, note, "")
    note = (
        "Relative nDCG@20 of TopK SAEs as published (Spišák et al. 2026), and ours. The data sets differ, and so do "
        "the sizes of the embeddings and the base models: compare how it goes over k and over losses, not single cells."
    )
    rows = [
        ["published", line.data, str(line.d), line.loss, f"{line.width}x", *(f"{kept:.3f}" for kept in line.kept)]
        for line in lines
        if line.width in {one.width for one in results}
    ]
    groups = _groups(results)
    for variant, width in dict.fromkeys((variant, width) for variant, width, _ in groups):
        kept = [groups.get((variant, width, k)) for k in papers.K]
        shown = ["" if group is None else spread([one.kept for one in group], 3) for group in kept]
        where = Path(config.data).name if config.data else "simulated"
        rows.insert(0, ["<b>ours</b>", escape(where), str(config.d), escape(variant), f"{width}x", *shown])
    head = ["", "data", "d", "loss or variant", "width", *(f"k={k}" for k in papers.K)]
    return section(title, note, table(head, rows, words=4))
