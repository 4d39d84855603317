"""Plots as SVG text, drawn from rows alone: the same rows give the same bytes."""

import math
from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 340, 70, 150, 40, 46
COLOURS = {"sae_kernels": "#1b6ca8", "torch": "#d1495b", "linear": "#8d8d8d"}
_MORE = ("#edae49", "#66a182", "#7d5ba6", "#2e4057", "#b5651d")


def _svg(title: str, body: list[str], height: int = HEIGHT) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">'
    )
    paper = f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    return "\n".join(
        [head, paper, f'<text x="{LEFT}" y="22" font-size="14">{_escape(title)}</text>', *body, "</svg>", ""]
    )


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _colour(name: str, names: Sequence[str]) -> str:
    others = [n for n in names if n not in COLOURS]
    return COLOURS[name] if name in COLOURS else _MORE[others.index(name) % len(_MORE)]


def _decades(low: float, high: float) -> range:
    return range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)


def lines(title: str, x_name: str, y_name: str, series: dict[str, list[tuple[float, float]]]) -> str:
    """Points joined by lines, both axes logarithmic. Values must be positive; ValueError where there are none."""
    points = [p for pairs in series.values() for p in pairs]
    if not points or min(min(p) for p in points) <= 0:
        raise ValueError(f"plot {title!r} needs positive points")
    xs, ys = sorted({p[0] for p in points}), _decades(min(p[1] for p in points), max(p[1] for p in points))
    x0, x1 = math.log10(xs[0]), math.log10(xs[-1]) or 1.0
    y0, y1 = ys[0], max(ys[-1], ys[0] + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x0) / ((x1 - x0) or 1)
        up = (math.log10(y) - y0) / (y1 - y0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    body = []
    for exponent in ys:
        _, y = place(xs[0], 10.0**exponent)
        body.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        body.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**exponent:g}</text>')
    for x in xs:
        px, _ = place(x, 10.0**y0)
        body.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>')
    body.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{_escape(x_name)}</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    body.append(
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{_escape(y_name)}</text>'
    )
    for number, (name, pairs) in enumerate(series.items()):
        colour = _colour(name, list(series))
        spots = [place(*pair) for pair in sorted(pairs)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in spots)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        body += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in spots]
        body.append(
            f'<text x="{WIDTH - RIGHT + 12}" y="{TOP + 14 + 18 * number}" fill="{colour}">{_escape(name)}</text>'
        )
    return _svg(title, body)


def bars(title: str, groups: dict[str, dict[str, float]]) -> str:
    """Horizontal bars by group; the value stands behind each bar."""
    values = [v for bars in groups.values() for v in bars.values()]
    if not values:
        raise ValueError(f"plot {title!r} needs a value")
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    label, room = 190, WIDTH - 190 - 70
    body, y = [], TOP
    for group, ratios in groups.items():
        body.append(f'<text x="12" y="{y + 13}" font-weight="bold">{_escape(group)}</text>')
        y += 20
        for name, value in ratios.items():
            length = max(1.0, room * value / max(values))
            body.append(f'<text x="{label - 8}" y="{y + 12}" text-anchor="end">{_escape(name)}</text>')
            body.append(
                f'<rect x="{label}" y="{y + 1}" width="{length:.1f}" height="14" fill="{_colour(name, names)}"/>'
            )
            body.append(f'<text x="{label + length + 6:.1f}" y="{y + 12}">{value:.2f}x</text>')
            y += 18
        y += 8
    return _svg(title, body, y + 8)
