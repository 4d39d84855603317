"""report.html of a demo run: one file with its plots, to be opened anywhere."""

import math
from html import escape
from pathlib import Path
from typing import Any

from .._plots import ACCENT, BASE, FONT, MUTED, PALETTE, SAE, plain
from .._plots import figure as _figure
from ..train.checkpoint import need

AUC_BARS = 40

STYLE = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #f5f6f8; color: #1f2933; font: 16px/1.55 {FONT}; }}
main {{ max-width: 1080px; margin: 0 auto; padding: 40px 24px 72px; }}
h1 {{ font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; }}
h2 {{ font-size: 20px; margin: 0 0 4px; }}
.lead, .note {{ color: {MUTED}; margin: 0; max-width: 78ch; }}
.note {{ font-size: 14.5px; margin-bottom: 12px; }}
section {{ background: #fff; border: 1px solid #e4e8ec; border-radius: 10px; padding: 22px 24px; margin-top: 20px; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(135px, 1fr)); gap: 12px; margin-top: 24px; }}
.card {{ background: #fff; border: 1px solid #e4e8ec; border-radius: 10px; padding: 13px 14px; }}
.card b {{ display: block; font-size: 25px; font-weight: 650; font-variant-numeric: tabular-nums; line-height: 1.25; }}
.card span {{ color: {MUTED}; font-size: 13.5px; line-height: 1.35; display: block; }}
.two {{ display: grid; grid-template-columns: 1fr 1fr; gap: 20px; }}
.two section {{ min-width: 0; }}
@media (max-width: 820px) {{ .two {{ grid-template-columns: 1fr; gap: 0; }} }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; }}
th, td {{ text-align: left; padding: 6px 10px 6px 0; border-bottom: 1px solid #edf0f2; vertical-align: top; }}
th {{ color: {MUTED}; font-weight: 600; position: sticky; top: 0; background: #fff; }}
td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; padding-right: 18px; }}
.scroll {{ max-height: 520px; overflow: auto; }}
.tag {{ background: #e3eef5; color: #1d4e6b; border-radius: 5px; padding: 1px 7px; white-space: nowrap; }}
.soft {{ color: {MUTED}; }}
input {{ font: inherit; font-size: 14.5px; padding: 7px 11px; border: 1px solid #cfd6dc; border-radius: 7px;
  width: 280px; margin-bottom: 10px; }}
footer {{ color: {MUTED}; font-size: 13.5px; margin-top: 24px; }}
"""

FILTER = """
document.getElementById('find').addEventListener('input', function (event) {
  const wanted = event.target.value.toLowerCase();
  for (const row of document.querySelectorAll('#latents tbody tr'))
    row.style.display = row.textContent.toLowerCase().includes(wanted) ? '' : 'none';
});
"""


def write_report(results: dict[str, Any], path: Path) -> None:
    """Writes the page for what run_demo returns. Needs plotly, whose JavaScript goes into the page once."""
    path.write_text(render(results), encoding="utf-8")


def render(results: dict[str, Any]) -> str:
    """The whole page as text."""
    script = need("plotly.offline", "the report", "demo").get_plotlyjs()
    config = results["config"]
    title = f"{config['model'].upper()} through a sparse autoencoder"
    body = [
        f"<h1>{escape(title)}</h1><p class='lead'>{escape(_lead(results))}</p>",
        _cards(results),
        "<div class='two'>",
        section(
            "What the SAE costs",
            "Ranking for held-out users: the original model, and the one that runs through the SAE.",
            plot(_ranking_figure(results)),
        ),
        section(
            "Training",
            "Share of the embeddings' variance that stays unexplained, and latents that fire no more.",
            plot(_training_figure(results)),
        ),
        "</div>",
        _concepts_section(results),
        _steering_section(results),
        section(
            "How often latents fire",
            f"Each latent by its share of {results['counted_rows']:,} rows drawn as in "
            f"training; {results['dead_share']:.2%} of {results['d_sae']:,} fire on none.",
            plot(_density_figure(results)),
        ),
        _latents_section(results),
        f"<footer>{escape(_foot(results))}</footer>",
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><script>{script}</script></head>"
        f"<body><main>{''.join(body)}</main><script>{FILTER}</script></body></html>\n"
    )


def _lead(results: dict[str, Any]) -> str:
    config = results["config"]
    return (
        f"{results['data']}. Embeddings of size {config['d']} pass through {results['d_sae']:,} latents, "
        f"{config['k']} active at a time; {config['steps']:,} training steps."
    )


def _cards(results: dict[str, Any]) -> str:
    cards = []
    for name, label in (("ndcg@20", "nDCG@20"), ("recall@20", "Recall@20")):
        base, spliced = results[f"base_{name}"], results[f"sae_{name}"]
        kept = f"{spliced / base:.1%}" if base else "-"
        cards.append((kept, f"of {label} kept: {base:.4f} to {spliced:.4f}"))
    cards += [
        (f"{1 - results['fvu']:.1%}", f"of variance explained (FVU {results['fvu']:.3f})"),
        (f"{results['cosine']:.3f}", "mean cosine of embedding and reconstruction"),
        (f"{results['l0']:.1f}", "active latents per row (L0)"),
        (f"{results['dead_share']:.2%}", "of latents dead"),
    ]
    if results["concepts"]:
        cards.append(
            (f"{results['mean_auc']:.3f}", f"mean AUC of the best latent of {len(results['concepts'])} concepts")
        )
    return (
        "<div class='cards'>"
        + "".join(f"<div class='card'><b>{b}</b><span>{escape(s)}</span></div>" for b, s in cards)
        + "</div>"
    )


def section(title: str, note: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p class='note'>{escape(note)}</p>{content}</section>"


def plot(figure: Any) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})


def _ranking_figure(results: dict[str, Any]) -> Any:
    figure, labels = _figure(300, bargap=0.45, yaxis_rangemode="tozero"), ["nDCG@20", "Recall@20"]
    for name, key, colour in (("original", "base", BASE), ("with SAE", "sae", SAE)):
        heights = [results[f"{key}_ndcg@20"], results[f"{key}_recall@20"]]
        figure.add_bar(
            name=name,
            x=labels,
            y=heights,
            marker_color=colour,
            text=[f"{h:.4f}" for h in heights],
            textposition="outside",
            cliponaxis=False,
        )
    return figure


def _training_figure(results: dict[str, Any]) -> Any:
    figure, history = (
        _figure(300, xaxis_title="step", yaxis_tickformat=".0%", yaxis_rangemode="tozero"),
        results["history"],
    )
    steps = [row["step"] for row in history if "fvu" in row]
    for name, key, colour in (("FVU", "fvu", SAE), ("dead latents", "dead_share", ACCENT)):
        figure.add_scatter(
            name=name,
            x=steps,
            y=[min(row[key], 1) for row in history if key in row],
            mode="lines",
            line={"color": colour, "width": 2.2},
        )
    return figure


def _concepts_section(results: dict[str, Any]) -> str:
    rows = results["concepts"]
    if not rows:
        return ""
    shown = sorted(rows, key=lambda row: -row["auc"])[:AUC_BARS]
    figure = _figure(70 + 21 * len(shown), xaxis_title="AUC")
    figure.add_bar(
        orientation="h",
        x=[row["auc"] for row in shown][::-1],
        y=[plain(row["concept"]) for row in shown][::-1],
        marker_color=SAE,
        customdata=[[row["latent"], row["precision"], row["recall"], row["items"]] for row in shown][::-1],
        hovertemplate="%{y}: AUC %{x:.3f}<br>latent %{customdata[0]}, precision %{customdata[1]:.2f}, "
        "recall %{customdata[2]:.2f}, %{customdata[3]} items<extra></extra>",
    )
    figure.update_xaxes(range=[0.5, 1])
    figure.update_layout(margin={"l": 150})
    # above the plot, where they wrap: beside their lines the labels do not fit on a narrow screen
    labels = []
    for key, label, colour in (
        ("mean_auc_untrained", "untrained SAE", MUTED),
        ("mean_auc_raw", "best raw dimension", ACCENT),
    ):
        if math.isfinite(results[key]):
            figure.add_vline(x=results[key], line={"color": colour, "width": 1.5, "dash": "dot"})
            labels.append(f"<span style='color:{colour}'>{label} {results[key]:.3f}</span>")
    some = f" The {AUC_BARS} best of {len(rows)} are shown." if len(rows) > AUC_BARS else ""
    note = (
        "How well one latent tells the items of a concept from the others: 0.5 is chance, 1 perfect. Dotted: the mean "
        "over all concepts for the best single dimension of the embedding, and for an untrained SAE over the "
        f"{results['untrained_concepts']} of {len(rows)} on which a latent of it fires often enough.{some}"
    )
    legend = f"<p class='note'>Bars: the best latent. Dotted: {', '.join(labels)}.</p>" if labels else ""
    return section("Concepts and their latents", note, legend + plot(figure))


def _steering_section(results: dict[str, Any]) -> str:
    rows = results["steering"]
    if not rows:
        return ""
    share = _figure(
        300, xaxis_title="strength", yaxis_tickformat=".0%", yaxis_title="share of the top 20", yaxis_rangemode="tozero"
    )
    ndcg = _figure(300, xaxis_title="strength", yaxis_title="nDCG@20", yaxis_rangemode="tozero")
    for place, concept in enumerate(dict.fromkeys(row["concept"] for row in rows)):
        here, name = [row for row in rows if row["concept"] == concept], plain(concept)
        x, colour = [row["strength"] for row in here], PALETTE[place % len(PALETTE)]
        for figure, key in ((share, "concept_share"), (ndcg, "ndcg")):
            figure.add_scatter(
                name=name, x=x, y=[row[key] for row in here], mode="lines+markers", line={"color": colour, "width": 2.2}
            )
    ndcg.add_hline(
        y=results["base_ndcg@20"],
        line={"color": MUTED, "width": 1.2, "dash": "dot"},
        annotation_text="without SAE",
        annotation_font={"color": MUTED, "size": 12},
        annotation_position="bottom left",
    )
    note = (
        "A share of every user's activation is moved to the concept's latents. Left: how much of the list is then of "
        "the concept. Right: how well the list still meets what the user went on to choose."
    )
    plots = "".join(f"<div style='min-width:0'>{plot(figure)}</div>" for figure in (share, ndcg))
    grid = f"<div class='two'>{plots}</div>"
    return section("Steering", note, grid)


def _density_figure(results: dict[str, Any]) -> Any:
    figure = _figure(280, xaxis_title="share of rows on which a latent fires", yaxis_title="latents", bargap=0.04)
    # bins are open above: a latent that fires on every row goes into the last one
    logs = [min(math.log10(density), -1e-9) for density in results["density"] if density > 0]
    low = math.floor(min(logs, default=-1))
    figure.add_histogram(
        x=logs,
        xbins={"start": low, "end": 0, "size": 0.1},
        marker_color=SAE,
        hovertemplate="%{y} latents<extra></extra>",
    )
    shares = [digit * 10.0**power for power in range(low, 0) for digit in (1, 2, 5)] + [1.0]
    ticktext = [f"{100 * share:g} %" for share in shares]
    figure.update_xaxes(tickvals=[math.log10(share) for share in shares], ticktext=ticktext)
    return figure


def _latents_section(results: dict[str, Any]) -> str:
    body = []
    for row in results["latents"]:
        name = f"<span class='tag'>{escape(row['name'])}</span>" if row["name"] else "<span class='soft'>no name</span>"
        auc = f"{row['auc']:.3f}" if row["auc"] else ""
        items = "; ".join(escape(example["title"]) for example in row["examples"])
        fired = row["fired_rows"] / results["counted_rows"]
        body.append(
            f"<tr><td class='n'>{row['latent']}</td><td>{name}</td><td class='n'>{auc}</td>"
            f"<td class='n'>{fired:.2%}</td><td>{items}</td></tr>"
        )
    head = (
        "<th class='n'>latent</th><th>concept</th><th class='n'>AUC</th><th class='n'>fires</th>"
        "<th>strongest items</th>"
    )
    table = f"<table id='latents'><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    search = "<input id='find' placeholder='Find a concept or a title' aria-label='Find a concept or a title'>"
    note = f"{len(body)} latents with their evidence: those with a name first, by AUC, then the busiest."
    return section("Latents", note, f"{search}<div class='scroll'>{table}</div>")


def _foot(results: dict[str, Any]) -> str:
    facts, stages = results["environment"], results["stage_seconds"]
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in stages.items())
    isa = f" ({results['instruction_set']})" if results["instruction_set"] else ""
    return (
        f"sae_kernels {facts['sae_kernels']}, torch {facts['torch']}, {facts['threads']} threads, "
        f"backend {results['backend']}{isa}. {results['seconds']:.0f} s in all: {times}. "
        f"Seed {results['config']['seed']}."
    )
