"""The look that all plots share; plotly is an extra and imported here alone."""

from collections.abc import Iterable
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

from ._need import need

BASE, SAE, ACCENT, MUTED = "#9aa7b5", "#2a6f97", "#d1793b", "#5c6873"
# told apart by those who see no red or no green too: 23 apart in CIELAB at the least, in all three
PALETTE = (
    "#2a6f97", "#d1793b", "#2d9e9e", "#621e0e", "#9fc59f", "#132a85", "#4c89e5", "#7f6b4c", "#79bdeb", "#46303f",
)  # fmt: skip
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"


def figure(height: int, purpose: str = "the plot", **layout: Any) -> Any:
    """An empty plotly figure of this height in pixels; layout: as update_layout takes it."""
    graph = need("plotly.graph_objects", purpose, "demo")
    made = graph.Figure()
    made.update_layout(
        template="plotly_white",
        height=height,
        font={"family": FONT, "size": 13, "color": "#1f2933"},
        margin={"l": 56, "r": 20, "t": 16, "b": 44},
        paper_bgcolor="white",
        plot_bgcolor="white",
        colorway=list(PALETTE),
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        **layout,
    )
    made.update_xaxes(gridcolor="#eef1f4", zerolinecolor="#dfe4e8")
    made.update_yaxes(gridcolor="#eef1f4", zerolinecolor="#dfe4e8")
    return made


def faded(colour: str, opacity: float) -> str:
    """A colour "#rrggbb" as rgba of this opacity."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def plain(text: str) -> str:
    """A text from data as plotly shows it letter by letter: it reads names, legends and labels as markup."""
    return escape(text, quote=False)


def known(values: Iterable[float]) -> list[float | None]:
    """None, of which plotly draws nothing, in place of NaN and Inf."""
    return [value if isfinite(value) else None for value in values]


def write_page(figures: list[tuple[str, str, Any]], path: Path, title: str) -> None:
    """One HTML file of (heading, note, figure), with plotly's script inside, to be opened anywhere."""
    script = need("plotly.offline", "the page", "demo").get_plotlyjs()
    config = {"displayModeBar": False, "responsive": True}
    parts = [
        f"<h2>{escape(heading)}</h2><p>{escape(note)}</p>"
        + made.to_html(full_html=False, include_plotlyjs=False, config=config)
        for heading, note, made in figures
    ]
    style = (
        f"body{{font:16px/1.55 {FONT};color:#1f2933;max-width:1080px;margin:0 auto;padding:32px 24px}}"
        f"p{{color:{MUTED};max-width:78ch;margin:0 0 8px}}h2{{margin:28px 0 4px;font-size:20px}}"
    )
    head = (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{style}</style>"
    )
    body = f"<script>{script}</script><h1>{escape(title)}</h1>{''.join(parts)}</html>"
    path.write_text(head + body, encoding="utf-8")
