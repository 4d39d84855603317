"""The accuracy command on a small simulation: its lines, what it resumes, its CSV and its page."""

import csv
import re
from statistics import fmean, stdev

import pytest
import torch

from sae_kernels.experiments import __main__ as experiments
from sae_kernels.experiments import accuracy, grid, stages
from sae_kernels.experiments.accuracy import AccuracyConfig, run_accuracy
from sae_kernels.experiments.grid_page import spread

pytest.importorskip("plotly", reason="the page needs plotly")


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_small_batches():
    threads, rows, counted = torch.get_num_threads(), stages.ROWS, stages.COUNTED
    torch.set_num_threads(1)
    stages.ROWS, stages.COUNTED = 128, 8
    yield
    torch.set_num_threads(threads)
    stages.ROWS, stages.COUNTED = rows, counted


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Grids as small as they get: the command's own take minutes."""
    config = AccuracyConfig(latents=(4, 8), seeds=(0, 1), k=4, width=2, steps=20, quiet=True,
                            out=tmp_path_factory.mktemp("accuracy") / "runs")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AccuracyConfig, "grids", shrunk(AccuracyConfig.grids))
        yield config, run_accuracy(config)


def shrunk(grids):
    from dataclasses import replace

    def small(config):
        return [replace(one, epochs=1, simulate=(200, 60, 4), d=min(one.d, 8)) for one in grids(config)]

    return small


def test_a_line_per_recommender_and_variant(ran):
    config, lines = ran
    losses = [f"published-{loss}{end}" for loss in ("l2", "cosine") for end in ("", "-refit")]
    published = ["topk", "topk-refit", *losses]
    assert [(line.name, line.variant) for line in lines] == [
        ("ELSA 8", "topk"),
        ("ELSA 8", "topk-refit"),
        *(("MULTVAE 4", variant) for variant in published),
        *(("MULTVAE 8", variant) for variant in published),
    ]
    for line in lines:
        assert [cell.seed for cell in line.cells] == [0, 1] and {cell.variant for cell in line.cells} == {line.variant}
        assert {(cell.k, cell.width, cell.d) for cell in line.cells} == {(4, 2, line.grid.d)}


def test_the_csv_holds_means_and_spreads(ran):
    config, lines = ran
    with (config.out / "accuracy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(lines)
    for row, line in zip(rows, lines, strict=True):
        assert (row["model"], row["d"], row["seeds"]) == (line.grid.model, str(line.grid.d), "2")
        for name in accuracy.FIGURES:
            values = [getattr(cell, name) for cell in line.cells]
            assert float(row[f"{name}_mean"]) == fmean(values) and float(row[f"{name}_sd"]) == stdev(values)


def test_the_page(ran):
    config, lines = ran
    page = re.sub(r"<script.*?</script>", "", (config.out / "results.html").read_text(), flags=re.S)
    for line in lines:
        assert spread(line.values("kept"), 3) in page and line.name in page
    assert "2 seeds, mean ± standard deviation" in page


def test_a_finished_run_trains_nothing_again(ran, monkeypatch):
    config, lines = ran
    monkeypatch.setattr(grid, "train_variant", None)
    monkeypatch.setattr(stages, "train_recommender", None)
    assert [line.cells for line in run_accuracy(config)] == [line.cells for line in lines]


def test_published_figures_of_this_k_and_width_stand_beside():
    assert "0.526" in accuracy._published(AccuracyConfig()) and "0.963" in accuracy._published(AccuracyConfig())
    assert "<td" not in accuracy._published(AccuracyConfig(k=5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "w.npz"}, "give --sequences too"),
        ({"latents": (64, 64)}, "--latents must name at least one size, each once"),
        ({"k": 700}, "--k 700 is more than the 512 latents"),
        ({"seeds": ()}, "--seeds must name at least one value"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        AccuracyConfig(**options).grids()


def test_sequences_bring_a_sasrec(tmp_path):
    (*_, one) = AccuracyConfig(sequences=tmp_path, latents=(8,), out=tmp_path).grids()
    assert (one.model, one.at, one.variants, one.data) == ("sasrec", 10, ("topk", "topk-refit"), tmp_path)


def test_the_command(tmp_path, capsys, monkeypatch):
    taken = []
    monkeypatch.setattr(accuracy, "run_accuracy", lambda config: taken.append(config) or [])
    assert (
        experiments.main(["accuracy", "--latents", "8", "16", "--seeds", "3", "--out", str(tmp_path), "--quiet"]) == 0
    )
    assert (taken[0].latents, taken[0].seeds, taken[0].out) == ((8, 16), (3,), tmp_path)
    monkeypatch.undo()
    assert experiments.main(["accuracy", "--weights", "w.npz", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "experiments accuracy: --weights are those of a SASRec: give --sequences too\n"
