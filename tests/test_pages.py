"""The pages' figures: nothing is drawn where there is no figure, data is no markup, and what looks alike is alike."""

import math
from dataclasses import replace

import pytest
import torch

from sae_kernels import _plots, interpret
from sae_kernels.experiments import grid_page, report
from sae_kernels.experiments.grid import CellResult
from sae_kernels.interpret import plots
from sae_kernels.steer import SteeringRow
from sae_kernels.steer import plots as steer_plots
from tests.test_concept_map import planted

pytest.importorskip("plotly", reason="plotly, of the demo extra, is not installed")

MARKUP, SHOWN = "<b>a</b> & <a href='x'>&amp;", "&lt;b&gt;a&lt;/b&gt; &amp; &lt;a href='x'&gt;&amp;amp;"


@pytest.fixture(scope="module")
def found():
    x, sae, concepts = planted()
    return interpret.concept_map(x, sae, concepts, resamples=10)


@pytest.fixture(scope="module")
def without():
    """No interval, and neither "birds" nor "dance" has a latent that fires five times on it."""
    x, sae, concepts = planted()
    found = interpret.concept_map(x, sae, concepts, resamples=0)
    together = found.scores.together.clone()
    together[[1, 3]] = 0
    return replace(found, scores=replace(found.scores, together=together))


def test_a_missing_score_is_no_marker(without):
    made = plots.concepts_figure(without, "correlation")
    best = made.data[-1]
    assert list(best.y[:2]) == ["dance", "birds"] and list(best.x[:2]) == [None, None] and None not in best.x[2:]
    assert not any(best.error_x.array) and not any(best.error_x.arrayminus)
    assert None not in made.data[0].x


def test_a_missing_mean_is_no_bar():
    nothing = {f"{by}{end}": math.nan for by in ("auc", "correlation") for end in ("", "_held_out", "_spread")}
    table = [{"reading": "lens", "detector": name, **nothing} for name in interpret.readings.DETECTORS]
    bar, dot = plots.readings_figure(table).data[:2]
    assert list(bar.y) == list(dot.y) == [None] and list(bar.text) == [""] and not bar.error_y.visible


def test_raw_dimensions_are_explained_either_way(found):
    curves = {curve.name: curve for curve in plots.explained_figure(found, "auc").data}
    raw = curves["raw dimensions"]
    wide = torch.maximum(found.raw.auc, 1 - found.raw.auc).amax(0)
    assert list(raw.y) == [float((wide >= t).double().mean()) for t in raw.x]
    assert list(raw.y) == interpret.explained_share(found.raw, list(raw.x), "auc", either_way=True)
    one_way = interpret.explained_share(found.raw, list(raw.x), "auc")
    assert sum(raw.y) > sum(one_way) and list(curves["SAE"].y) == interpret.explained_share(
        found.scores, list(raw.x), "auc"
    )
    with pytest.raises(ValueError, match="either way there are auc and correlation alone, got 'f1'"):
        interpret.explained_share(found.raw, [0.5], "f1", either_way=True)


def test_bars_are_spoken_of_where_there_are_some(found, without):
    notes = {heading: note for heading, note, _ in plots.pages(found)}
    assert notes["Concepts by AUC"].startswith("Bars: 95 % bootstrap") and "controls" in notes["Concepts by AUC"]
    assert all("Bars" not in note for _, note, _ in plots.pages(without))
    rows = [SteeringRow(s, 0.1, 0.5, 0.2, 20, 0.1, 0.1, 1.0, 1.0, 0.5, method="m") for s in (0.0, 1.0)]
    assert not any("Bands" in note for _, note, _ in steer_plots.pages(rows))
    some = [replace(row, errors={"ndcg": 0.01}) for row in rows]
    notes = {heading: note for heading, note, _ in steer_plots.pages(some, bands="spread over the runs")}
    assert notes["Personal nDCG"] == "Bands: 95 %, spread over the runs." and notes["Personal recall"] == ""


def test_data_is_no_markup(found, monkeypatch):
    assert _plots.plain(MARKUP) == SHOWN
    named = replace(found, names=[MARKUP, *found.names[1:]])
    assert all(SHOWN in trace.y and MARKUP not in trace.y for trace in plots.concepts_figure(named).data)
    rows = [SteeringRow(s, 0.1, 0.5, 0.2, 20, 0.1, 0.1, 1.0, 1.0, 0.5, method=MARKUP) for s in (0.0, 1.0)]
    line, front = steer_plots.front_figure(rows).data
    assert line.name == SHOWN and front.customdata[0] == f"{SHOWN}, 0.0"
    assert steer_plots.curve_figure(rows, "ndcg").data[0].name == SHOWN
    concept = {"concept": MARKUP, "auc": 0.7, "latent": 1, "precision": 0.5, "recall": 0.5, "items": 9}
    steering = [{"concept": MARKUP, "strength": 0.0, "concept_share": 0.1, "ndcg": 0.2}]
    given = {"mean_auc_untrained": 0.6, "mean_auc_raw": 0.6, "untrained_concepts": 1, "base_ndcg@20": 0.2}
    drawn = []
    monkeypatch.setattr(report, "plot", lambda made: drawn.append(made) or "")
    report._concepts_section({"concepts": [concept], **given})
    report._steering_section({"steering": steering, **given})
    assert drawn[0].data[0].y == (SHOWN,) and [made.data[0].name for made in drawn[1:]] == [SHOWN, SHOWN]


def test_the_report_without_a_control():
    concept = {"concept": "art", "auc": 0.7, "latent": 1, "precision": 0.5, "recall": 0.5, "items": 9}
    results = {"concepts": [concept] * 3, "mean_auc_untrained": math.nan, "mean_auc_raw": 0.65, "untrained_concepts": 0}
    text = report._concepts_section(results)
    assert "nan" not in text.lower() and "best raw dimension 0.650" in text and "0 of 3 on which" in text
    text = report._concepts_section({**results, "mean_auc_untrained": 0.61, "untrained_concepts": 2})
    assert "untrained SAE 0.610" in text and "2 of 3 on which" in text


def test_a_latent_that_always_fires_is_in_the_histogram():
    made = report._density_figure({"density": [1.0, 1.0, 0.5, 0.02, 0.001, 0.0]})
    shown, bins = made.data[0].x, made.data[0].xbins
    assert len(shown) == 5 and all(bins.start <= value < bins.end for value in shown)
    labels = ["0.1 %", "0.2 %", "0.5 %", "1 %", "2 %", "5 %", "10 %", "20 %", "50 %", "100 %"]
    assert list(made.layout.xaxis.ticktext) == labels and made.layout.xaxis.tickvals[-1] == 0


def test_a_page_fits_a_narrow_screen(tmp_path):
    _plots.write_page([], tmp_path / "page.html", "a page")
    page = (tmp_path / "page.html").read_text()
    assert "<meta name='viewport' content='width=device-width, initial-scale=1'>" in page


def test_variants_and_widths_look_different():
    assert len(set(_plots.PALETTE)) == len(_plots.PALETTE) >= 10
    variants, widths = [f"variant {place}" for place in range(12)], (1, 2, 4, 8)
    numbers = [0.1] * 10
    cells = [CellResult(name, width, 8, 0, 16, *numbers, 100, 1.0) for name in variants for width in widths]
    lines = grid_page._kept_figure(cells).data
    looks = {(line.line.color, line.marker.symbol, line.line.dash) for line in lines}
    assert len(looks) == len(lines) == 48 and lines[3].line.dash == "solid"
    dots = grid_page._cosine_figure(cells).data
    assert len({(dot.marker.color, dot.marker.symbol) for dot in dots}) == len(dots) == 12
