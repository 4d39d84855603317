"""The study of a demo run: its files, its figures against the library's, and what it refuses."""

import csv

import pytest
import torch

from sae_kernels.experiments.__main__ import main
from sae_kernels.experiments.demo import DemoConfig, run_demo
from sae_kernels.experiments.study import StudyConfig, run_study
from sae_kernels.steer import pareto_front

pytest.importorskip("plotly", reason="the study's pages need plotly, of the demo extra")


@pytest.fixture(scope="module", params=["elsa", "sasrec"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    settings = {"simulate": (500, 120, 6), "d": 32, "k": 8, "width": 4, "steps": 100, "epochs": 6, "quiet": True}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_demo(DemoConfig(model=request.param, out=folder, **settings))
    yield folder
    torch.set_num_threads(threads)


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_files_hold_what_was_found(run, capsys):
    found, rows = run_study(StudyConfig(run, users=60, explained=2, strengths=(0.0, 0.5, 1.0), resamples=10))
    out = run / "study"
    concepts = table(out / "concepts.csv")
    assert [row["concept"] for row in concepts] == found.names and float(concepts[0]["auc"]) > 0.5
    assert len(table(out / "latents.csv")) == int((found.stats.counts > 0).sum())
    steering = table(out / "steering.csv")
    assert [float(row["ndcg"]) for row in steering] == [row.ndcg for row in rows] and len(rows) == 18
    front = {(row.method, row.strength) for row in pareto_front(rows)}
    assert {(row["method"], float(row["strength"])) for row in steering if row["on_front"] == "True"} == front
    by = {(row.method, row.strength): row for row in rows}
    # without steering these three are the model itself
    without = [by[name, 0.0].ndcg for name in ("the same, with error term", "linear probe", "tag re-rank")]
    assert without[0] == pytest.approx(without[1], abs=1e-9) and without[1] == pytest.approx(without[2], abs=1e-9)
    for method in ("50 latents by lens", "200 latents near the user", "linear probe", "tag re-rank"):
        assert by[method, 1.0].segment_ndcg > by[method, 0.0].segment_ndcg + 0.1
    assert (out / "explanations.txt").read_text().count("rank 1, score") == 2
    for page in ("concepts.html", "steering.html"):
        assert (out / page).read_text().count("plotly-graph-div") >= 5
    said = capsys.readouterr().out
    assert "at 5% loss" in said and "6 concepts x 128 latents" in said


def test_untagged_items_hurt_the_re_rank(run, tmp_path):
    options = {"users": 60, "explained": 0, "strengths": (0.0, 1.0), "resamples": 0}
    full, gaps = (
        {(row.method, row.strength): row for row in run_study(StudyConfig(run, tmp_path, untagged=share, **options))[1]}
        for share in (0.0, 0.6)
    )
    assert full["tag re-rank", 1.0].segment_ndcg > 0.99 > gaps["tag re-rank", 1.0].segment_ndcg + 0.01
    assert full["tag re-rank", 0.0].ndcg == pytest.approx(gaps["tag re-rank", 0.0].ndcg, abs=1e-9)


def test_mistakes_are_said(tmp_path, capsys):
    assert main(["study", str(tmp_path)]) == 2
    assert "holds no run of the demo" in capsys.readouterr().err
    assert main(["study", str(tmp_path), "--untagged", "1"]) == 2
    assert "--untagged must be in [0, 1), got 1.0" in capsys.readouterr().err
    assert main(["study", str(tmp_path), "--users", "0"]) == 2
    assert "--users must be at least 1, got 0" in capsys.readouterr().err
