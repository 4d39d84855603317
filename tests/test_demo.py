"""The demo end to end on small simulations: what it writes, what it recovers, what it resumes, what it refuses."""

import json
import re

import pytest
import torch

from sae_kernels.data import simulate
from sae_kernels.experiments import demo, findings, stages
from sae_kernels.experiments.demo import DemoConfig, run_demo
from sae_kernels.experiments.report import render
from sae_kernels.hooks import attach
from sae_kernels.train import Interrupted, load_sae
from sae_kernels.train import loop as train_loop

pytest.importorskip("plotly", reason="the demo's report needs plotly")

KEYS = (
    "base_ndcg@20",
    "sae_ndcg@20",
    "base_recall@20",
    "sae_recall@20",
    "fvu",
    "cosine",
    "l0",
    "dead_share",
    "backend",
    "seconds",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_small_batches():
    threads, rows = torch.get_num_threads(), stages.ROWS
    torch.set_num_threads(1)
    stages.ROWS = 256
    yield
    torch.set_num_threads(threads)
    stages.ROWS = rows


def small(tmp_path, model="elsa", **options):
    settings = {"simulate": (500, 160, 8), "d": 32, "k": 8, "width": 4, "steps": 200, "quiet": True}
    return DemoConfig(model=model, out=tmp_path / "run", **{**settings, **options})


@pytest.fixture(scope="module")
def elsa(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsa")
    config = small(folder, simulate=(1500, 300, 8), steps=400, epochs=20)
    return config, run_demo(config)


@pytest.mark.parametrize("model", ["multvae", "sasrec"])
def test_each_model_end_to_end(tmp_path, model):
    results = run_demo(small(tmp_path, model, epochs=4))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert all(key in metrics for key in KEYS)
    assert metrics["fvu"] < 0.9 and 0 < metrics["l0"] <= 8 and -1 <= metrics["cosine"] <= 1
    assert [row["strength"] for row in metrics["steering_mean"]] == list(findings.STRENGTHS)
    assert metrics["steering_mean"][-1]["concept_share"] > metrics["steering_mean"][0]["concept_share"]
    assert len(results["density"]) == 128
    assert load_sae(tmp_path / "run" / "sae").d_sae == 128


def test_elsa_figures(elsa):
    config, results = elsa
    metrics = json.loads((config.out / "metrics.json").read_text())
    assert all(key in metrics for key in KEYS)
    assert metrics["backend"] in ("cpu", "reference")
    # a list of 20 random items of 300 holds a target with chance 1 / 15; the planted tastes are worth more
    assert metrics["base_recall@20"] > 0.12
    assert metrics["sae_ndcg@20"] > 0.85 * metrics["base_ndcg@20"]
    assert metrics["fvu"] < 0.5 and metrics["cosine"] > 0.8
    assert metrics["seconds"] >= sum(metrics["stage_seconds"].values()) - 0.1


def test_planted_concepts_are_recovered(elsa):
    _, results = elsa
    assert len(results["concepts"]) == 8
    assert results["mean_auc"] > results["mean_auc_untrained"] + 0.05 and 0 < results["untrained_concepts"] <= 8
    assert results["mean_auc"] > 0.7


def test_the_figures_are_those_of_the_saved_models(elsa):
    config, results = elsa
    filled = config.filled()
    parts = stages.split(stages.load_data(filled), filled)
    model = stages.new_recommender(parts, filled)
    stages.restore_recommender(model, config.out / "recommender.safetensors")
    sae = load_sae(config.out / "sae")
    assert stages.ranking(model, parts)["ndcg@20"] == pytest.approx(results["base_ndcg@20"], abs=1e-9)
    assert stages.ranking(model, parts, sae)["ndcg@20"] == pytest.approx(results["sae_ndcg@20"], abs=1e-9)
    with attach(model, "encoder", sae, error_term=True):
        assert stages.ranking(model, parts)["ndcg@20"] == pytest.approx(results["base_ndcg@20"], abs=1e-9)
    assert results["base_ndcg@20"] != results["sae_ndcg@20"]


def test_held_out_users_are_held_out(elsa):
    config, _ = elsa
    filled = config.filled()
    parts = stages.split(stages.load_data(filled), filled)
    assert len(parts.train) == 1350 and len(parts.test.inputs) == 150
    lengths = parts.test.inputs.lengths + parts.test.targets.lengths
    assert torch.equal(parts.test.targets.lengths, (lengths + 4) // 5)
    everything = parts.train.flat.numel() + parts.test.inputs.flat.numel() + parts.test.targets.flat.numel()
    assert everything == len(parts.data)


def test_steering_raises_the_share_of_the_concept(elsa):
    _, results = elsa
    shares = [row["concept_share"] for row in results["steering_mean"]]
    assert shares == sorted(shares) and shares[-1] > 1.5 * shares[0]
    assert len({row["concept"] for row in results["steering"]}) == findings.STEERED


def test_the_report(elsa):
    config, results = elsa
    page = (config.out / "report.html").read_text()
    assert page.count("plotly.js v") == 1 and len(re.findall(r"Plotly\.newPlot\(", page)) >= 6
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=", page), "self-contained"
    assert f"{results['sae_ndcg@20']:.4f}" in page
    assert all(row["concept"] in page for row in results["concepts"])
    hostile = {**results, "data": "<script>alert(1)</script>"}
    assert "<script>alert(1)</script>" not in render(hostile)


def test_raw_auc_against_counting_pairs():
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 5, generator=g), torch.rand(60, 3, generator=g) < 0.3
    expected = []
    for concept in range(3):
        inside, outside = x[labels[:, concept]], x[~labels[:, concept]]
        auc = (inside[:, None] > outside[None]).double().mean((0, 1))
        expected.append(torch.maximum(auc, 1 - auc).max())
    torch.testing.assert_close(findings.best_raw_auc(x, labels), torch.stack(expected), atol=1e-12, rtol=0)


def test_same_seed_same_figures(tmp_path):
    first, second, other = (
        run_demo(small(tmp_path / name, epochs=2, steps=40, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    for key in KEYS[:-2]:
        assert first[key] == second[key], key
    assert first["fvu"] != other["fvu"]


def test_an_interrupted_demo_resumes_to_the_same_figures(tmp_path, monkeypatch):
    whole = run_demo(small(tmp_path / "whole", epochs=2, steps=40))
    advance, done = train_loop._advance, []

    def cut(run, batch, bar):
        advance(run, batch, bar)
        done.append(run.step)
        if run.step == 25:
            monkeypatch.setattr(train_loop, "_next", lambda source: None)

    with monkeypatch.context() as patched:
        patched.setattr(train_loop, "_advance", cut)
        after = train_loop._next
        with pytest.raises(Interrupted, match="interrupted after step 25"):
            run_demo(small(tmp_path, epochs=2, steps=40))
        monkeypatch.setattr(train_loop, "_next", after)
    assert done[-1] == 25 and not (tmp_path / "run" / "metrics.json").exists()
    with pytest.raises(ValueError, match=r"--resume: this run is not the one in .*: steps was 40 and is 50"):
        run_demo(small(tmp_path, epochs=2, steps=50, resume=True))
    resumed = run_demo(small(tmp_path, epochs=2, steps=40, resume=True))
    for key in KEYS[:-2]:
        assert resumed[key] == whole[key], key
    assert resumed["history"] == whole["history"]


def test_a_new_run_takes_nothing_from_an_old_one(tmp_path, monkeypatch):
    run_demo(small(tmp_path, epochs=2, steps=20))

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "train_recommender", fail)
    with pytest.raises(KeyboardInterrupt):
        run_demo(small(tmp_path, epochs=2, steps=30))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.json"]
    monkeypatch.undo()
    resumed = run_demo(small(tmp_path, epochs=2, steps=30, resume=True))
    assert resumed["history"][-1]["step"] == 30


def test_metrics_are_plain_json(tmp_path):
    assert demo._as_json({"a": [1.5, float("nan")], "b": float("inf"), "c": "x"}) == {
        "a": [1.5, None],
        "b": None,
        "c": "x",
    }


def test_resuming_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        run_demo(small(tmp_path, resume=True))


def write_csv(path, data, time=True):
    import pandas

    columns = {"who": [f"u{u}" for u in data.users.tolist()], "what": data.items.tolist(), "stars": [5.0] * len(data)}
    if time:
        columns["at"] = data.order.tolist()
    pandas.DataFrame(columns).to_csv(path, index=False)


def test_a_file_of_interactions_without_concepts(tmp_path):
    write_csv(tmp_path / "log.csv", simulate(300, 100, 5, seed=1))
    options = {"interactions": tmp_path / "log.csv", "user_col": "who", "item_col": "what", "epochs": 4, "steps": 60}
    results = run_demo(small(tmp_path, **options))
    assert results["concepts"] == [] and len(results["latents"]) > 0
    assert {row["concept"].split()[0] for row in results["steering"]} == {"items"}
    assert results["steering_mean"][-1]["concept_share"] > results["steering_mean"][0]["concept_share"]
    assert "Steering" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("normalize", ["none", "l2", "layer_norm", "global"])
def test_every_normaliser(tmp_path, normalize):
    results = run_demo(small(tmp_path, normalize=normalize, epochs=2, steps=30, simulate=(200, 80, 4)))
    assert results["fvu"] < 1.5 and results["config"]["normalize"] == normalize
    assert load_sae(tmp_path / "run" / "sae").normalize == normalize


def test_refitted_values_come_closer(tmp_path):
    given = {"epochs": 2, "steps": 30, "simulate": (200, 80, 4)}
    fvu = {}
    for steps in (0, 4):
        results = run_demo(small(tmp_path / str(steps), refit=steps, **given))
        fvu[steps], sae = results["fvu"], load_sae(tmp_path / str(steps) / "run" / "sae")
        assert sae.refit == steps
    assert fvu[4] < 0.95 * fvu[0]


def test_what_the_demo_refuses(tmp_path):
    write_csv(tmp_path / "log.csv", simulate(60, 40, 4, seed=1), time=False)
    file = {"interactions": tmp_path / "log.csv", "user_col": "who", "item_col": "what"}
    refused = [
        ({"model": "svd"}, "--model must be one of elsa, multvae, sasrec, got 'svd'"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"refit": -1}, "--refit must be at least 0, got -1"),
        ({"k": 999}, "--k 999 is more than the 128 latents of --width 4"),
        ({"user_col": "who"}, "go with --interactions"),
        ({"interactions": tmp_path / "log.csv"}, "needs --user-col and --item-col"),
        ({**file, "model": "sasrec"}, "has no time order, which sasrec needs"),
        ({**file, "rating_col": "stars", "min_rating": 6.0}, "log.csv"),
        ({**file, "item_col": "item"}, "log.csv.*item"),
        ({**file, "item_col": "who"}, "--user-col and --item-col must be two columns, got 'who' for both"),
        ({"simulate": (60, 12, 4)}, "12 items; lists of 20 need as many"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            run_demo(small(tmp_path, **options))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        run_demo(small(tmp_path, data=tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists(), "nothing is written before the input is known to be good"
