"""The study of a demo run: its files, its figures against the library's, and what it refuses."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from sae_kernels.experiments.__main__ import main
from sae_kernels.experiments.demo import DemoConfig, run_demo
from sae_kernels.experiments.studies import StudiesConfig, run_studies
from sae_kernels.experiments.study import StudyConfig, run_study
from sae_kernels.interpret import readings_table
from sae_kernels.steer import at_loss, pareto_front

pytest.importorskip("plotly", reason="the study's pages need plotly, of the demo extra")


SMALL = {"simulate": (500, 120, 6), "d": 32, "k": 8, "width": 4, "steps": 100, "epochs": 6}
STRENGTHS = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module", params=["elsa", "sasrec"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_demo(DemoConfig(model=request.param, out=folder, quiet=True, **SMALL))
    yield folder
    torch.set_num_threads(threads)


def same(one, other):
    """As JSON: a NaN is not equal to itself."""
    return json.dumps(one) == json.dumps(other)


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_files_hold_what_was_found(run, capsys):
    study = run_study(StudyConfig(run, users=60, explained=2, strengths=STRENGTHS, resamples=10))
    found, rows, out = study.found, study.steering.table, run / "study"
    concepts = table(out / "concepts.csv")
    assert [row["concept"] for row in concepts] == found.names and float(concepts[0]["auc"]) > 0.5
    assert len(table(out / "latents.csv")) == int((found.stats.counts > 0).sum())
    readings = readings_table(study.readings)
    assert [float(row["auc"]) for row in table(out / "readings.csv")] == [row["auc"] for row in readings]
    shown = {one.reading: one for one in study.readings if one.detector == "latents"}
    assert set(shown) == {"activation", "lens", "audience"}
    assert [float(row["audience_auc"]) for row in concepts] == shown["audience"].auc.tolist()
    steering = table(out / "steering.csv")
    assert [float(row["ndcg"]) for row in steering] == [row.ndcg for row in rows] and len(rows) == 24
    front = {(row.method, row.strength) for row in pareto_front(rows)}
    assert {(row["method"], float(row["strength"])) for row in steering if row["on_front"] == "True"} == front
    base = study.steering.base
    for row in table(out / "gains.csv"):
        point = at_loss(rows, base.ndcg, float(row["loss"]))[row["method"]]
        assert float(row["gain"]) == pytest.approx(point.segment_ndcg / base.segment_ndcg)
    by = {(row.method, row.strength): row for row in rows}
    # without steering these three are the model itself
    without = [by[name, 0.0].ndcg for name in ("the same, with error term", "linear probe", "tag re-rank")]
    assert without[0] == pytest.approx(without[1], abs=1e-9) and without[1] == pytest.approx(without[2], abs=1e-9)
    for method in (
        "50 latents by lens", "latents near the user", "latents near liked items", "linear probe",
        "liked items, no SAE", "tag re-rank",
    ):  # fmt: skip
        assert by[method, 1.0].segment_ndcg > by[method, 0.0].segment_ndcg + 0.05
    assert (out / "explanations.txt").read_text().count("rank 1, score") == 2
    for page in ("concepts.html", "steering.html"):
        assert (out / page).read_text().count("plotly-graph-div") >= 5
    said = capsys.readouterr().out
    assert "at a loss of nDCG" in said and "6 concepts x 128 latents" in said and "audience, latents" in said


def test_the_number_of_latents_is_chosen_on_other_users(run, tmp_path):
    options = {"explained": 0, "strengths": STRENGTHS, "resamples": 0}
    few, all_of_them = (run_study(StudyConfig(run, tmp_path, users=n, **options)).steering for n in (5, 2000))
    assert few.choosing == all_of_them.choosing and few.choosers == all_of_them.choosers > 0
    for method, tried in few.choosing.items():
        assert len(tried) >= 3 and tried[few.chosen[method]] == max(tried.values())
    assert {"latents near the user", "latents near liked items", "linear probe"} < set(few.choosing)
    assert few.users + few.left_out == 5 < all_of_them.users


def test_several_runs_are_made_once_and_averaged(tmp_path, capsys, one_thread):
    options = {"users": 40, "explained": 0, "strengths": STRENGTHS, "resamples": 0}
    config = StudiesConfig(tmp_path, seeds=(0, 1), study=options, demo=SMALL)
    found = run_studies(config)
    first = capsys.readouterr().out
    assert first.count("training elsa") == first.count("studying") == 2 and "2 runs, mean ± standard" in first
    assert "at 5%: tag re-rank > " in first
    values = [next(r["auc"] for r in one["readings"] if r["detector"] == "latents") for one in found]
    summary = {(row["what"], row["figure"]): row for row in table(tmp_path / "summary.csv")}
    row = summary["activation, latents", "auc"]
    assert values[0] != values[1] and float(row["mean"]) == pytest.approx(sum(values) / 2)
    assert float(row["standard_deviation"]) == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    gains = [r["gain"] for one in found for r in one["gains"] if (r["method"], r["loss"]) == ("tag re-rank", 0.05)]
    assert float(summary["tag re-rank at 5% loss", "gain"]["mean"]) == pytest.approx(sum(gains) / 2)
    page = (tmp_path / "summary.html").read_text()
    assert page.count("plotly-graph-div") >= 5 and "2 runs: concepts and steering" in page
    # the same again trains and studies nothing; a run without its study is studied alone
    assert same(run_studies(config), found) and "ing elsa" not in capsys.readouterr().out
    (tmp_path / "seed-1" / "study" / "study.json").unlink()
    assert same(run_studies(config), found)
    said = capsys.readouterr().out
    assert "training" not in said and f"studying {tmp_path / 'seed-1'}" in said and said.count("studied already") == 1
    # runs that are there already give the same summary; other options study anew
    runs = tuple(tmp_path / f"seed-{seed}" for seed in (0, 1))
    assert same(run_studies(StudiesConfig(tmp_path / "other", runs, study=options)), found)
    run_studies(replace(config, study={**options, "users": 41}))
    assert capsys.readouterr().out.count("studying") == 2
    with pytest.raises(ValueError, match="seed-0 holds another run than --data, --model and --seeds name"):
        run_studies(replace(config, demo={**SMALL, "steps": 99}))


def test_untagged_items_hurt_the_re_rank(run, tmp_path):
    options = {"users": 60, "explained": 0, "strengths": (0.0, 1.0), "resamples": 0}
    full, gaps = (
        {
            (row.method, row.strength): row
            for row in run_study(StudyConfig(run, tmp_path, untagged=share, **options)).steering.table
        }
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
    assert main(["study", str(tmp_path), "--seeds", "1"]) == 2
    assert "RUN are made already; --data and --seeds make their own" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"strengths must hold 0, without steering, got \(0.5,\)"):
        run_study(StudyConfig(tmp_path, strengths=(0.5,)))
