"""Selectivity against hand-made distributions; the latent table; that the plots hold what the map says."""

import math

import pytest
import torch
from test_concept_map import planted

from sae_kernels import _plots, interpret
from sae_kernels.interpret import plots


def test_selectivity_by_hand():
    mass = torch.tensor([[1.0, 1, 1, 1], [4, 0, 0, 0], [0, 0, 0, 0], [0, 3, 0, 1]])
    got = interpret.selectivity(mass)
    mean = [(0.25 + 1 + 0) / 3, (0.25 + 0.75) / 3, 0.25 / 3, (0.25 + 0.25) / 3]
    average = -sum(p * math.log2(p) for p in mean)
    three = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert got.entropy[[0, 1, 3]].tolist() == pytest.approx([2, 0, three])
    divergence = [
        sum(0.25 * math.log2(0.25 / p) for p in mean),
        math.log2(1 / mean[0]),
        0.75 * math.log2(0.75 / mean[1]) + 0.25 * math.log2(0.25 / mean[3]),
    ]
    assert got.divergence[[0, 1, 3]].tolist() == pytest.approx(divergence)
    assert got.decrease[[0, 1, 3]].tolist() == pytest.approx([(average - h) / average for h in (2, 0, three)])
    assert got.entropy[2].isnan() and got.divergence[2].isnan() and got.decrease[2].isnan()


def test_selectivity_edges():
    alike = interpret.selectivity(torch.ones(3, 5))
    torch.testing.assert_close(alike.divergence, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(alike.decrease, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert interpret.selectivity(torch.ones(3, 1)).decrease.tolist() == [0, 0, 0]
    assert interpret.selectivity(torch.zeros(2, 3)).entropy.isnan().all()
    for bad in (-1.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="mass must be finite and not negative"):
            interpret.selectivity(torch.tensor([[1.0, bad]]))


def test_explained_share_counts_live_latents_only():
    values, labels = torch.tensor([[1.0], [1.0], [1.0], [0.0]]), torch.tensor([[True], [True], [False], [False]])
    scores = interpret.concept_scores(values, torch.tensor([[0], [0], [1], [2]]), 4, labels)
    assert interpret.explained_share(scores, [0.9, 1.0, 1.1]) == [0.5, 0.5, 0]
    assert interpret.explained_share(scores, [0.7], by="precision") == [0.5]
    with pytest.raises(ValueError, match="by must be auc"):
        interpret.explained_share(scores, [0.5], by="lift")


def test_latent_table():
    x, sae, concepts = planted()
    found = interpret.concept_map(x, sae, concepts, resamples=0)
    titles = [f"item {i}" for i in range(len(x))]
    rows = interpret.latent_table(found, titles, examples=3)
    over = interpret.selectivity(found.mass.T)
    assert [row["latent"] for row in rows if row["decrease"] is not None] == [
        f for f in over.decrease.argsort(descending=True, stable=True).tolist() if not over.decrease[f].isnan()
    ]
    assert {row["latent"] for row in rows} == set((found.stats.counts > 0).nonzero().squeeze(1).tolist())
    by_latent = {row["latent"]: row for row in rows}
    named = interpret.name_latents(found.scores, found.names)
    for f, row in by_latent.items():
        assert row["name"] == (named[f].concept if f in named else None)
        assert row["fires"] == found.stats.counts[f] and len(row["examples"]) == min(3, row["fires"])
        assert row["correlation"] == found.scores.correlation[:, f].max()
        assert row["examples"] == sorted(row["examples"], key=lambda pair: -pair[1])
    assert [by_latent[f]["concept"] for f in range(4)] == ["art", "birds", "cars", "dance"]
    assert interpret.latent_table(found, titles, min_auc=2.0)[0]["name"] is None
    assert interpret.latent_table(found)[0]["examples"][0][0] == rows[0]["examples"][0][0].removeprefix("item ")
    without = interpret.latent_table(interpret.concept_map(x, sae, concepts, resamples=0, examples=0), titles)
    assert without == [{**row, "examples": []} for row in rows]
    concepts_rows = interpret.concept_selectivity(found)
    assert [r["decrease"] for r in concepts_rows] == sorted((r["decrease"] for r in concepts_rows), reverse=True)
    assert len(concepts_rows) == 4


def test_plots_hold_the_map(tmp_path):
    pytest.importorskip("plotly", reason="plotly, of the demo extra, is not installed")
    x, sae, concepts = planted()
    found = interpret.concept_map(x, sae, concepts, resamples=20)
    best = plots.concepts_figure(found, "correlation").data[-1]
    assert sorted(best.x) == pytest.approx(sorted(found.baselines("correlation")["sae"].tolist()))
    assert list(best.x) == sorted(best.x) and all(e >= 0 for e in best.error_x.array)
    assert len(plots.concepts_figure(found, bars=2).data[-1].x) == 2
    curves = plots.explained_figure(found).data
    assert [curve.name for curve in curves] == ["SAE", "raw dimensions", "untrained SAE"]
    assert list(curves[0].y) == interpret.explained_share(found.scores, list(curves[0].x))
    assert [len(trace.x) for trace in plots.selectivity_figure(found).data][1] == 4
    alone = interpret.concept_map(x, sae, concepts, resamples=0, baselines=False)
    assert len(plots.distributions_figure(alone).data) == len(plots.explained_figure(alone).data) == 1
    _plots.write_page(plots.pages(found), tmp_path / "map.html", "A <map>")
    page = (tmp_path / "map.html").read_text()
    assert "A &lt;map&gt;" in page and page.count("plotly-graph-div") >= 5


def test_readings_figure_holds_the_table():
    pytest.importorskip("plotly", reason="plotly, of the demo extra, is not installed")
    names = [(reading, detector) for reading in ("activation", "lens") for detector in interpret.readings.DETECTORS]
    table = [
        {"reading": reading, "detector": detector, "auc": 0.6 + place / 50, "auc_held_out": 0.6,
         "auc_spread": place / 99, "correlation": place / 9, "correlation_held_out": 0.1}
        for place, (reading, detector) in enumerate(names)
    ]  # fmt: skip
    traces = plots.readings_figure(table).data
    assert [trace.name for trace in traces[::2]] == list(interpret.readings.DETECTORS)
    assert list(traces[2].y) == [table[1]["auc"], table[4]["auc"]] and list(traces[3].y) == [0.6, 0.6]
    assert list(traces[2].error_y.array) == [1 / 99, 4 / 99] and traces[2].error_y.visible
    assert not plots.readings_figure(table, "correlation").data[2].error_y.visible
    assert len(plots.reading_pages(table)) == 2 and plots.reading_pages([]) == []
