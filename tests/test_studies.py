"""The study of several runs: what counts as studied already, and what it refuses before it begins."""

import json

import pytest

from sae_kernels.experiments import studies
from sae_kernels.experiments.__main__ import main
from sae_kernels.experiments.studies import StudiesConfig, run_studies
from sae_kernels.experiments.study import StudyConfig, run_digest


def made_run(folder, weights="weights"):
    for name in ("run.json", "recommender.safetensors", "sae/config.json", "sae/model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(weights if name.startswith("sae/model") else "{}")
    return folder


def test_a_study_of_an_earlier_run_is_not_taken_for_this_ones(tmp_path, monkeypatch):
    studied = []

    def study(config):
        config.folder.mkdir(exist_ok=True)
        note = {"config": config.identity(), "run": run_digest(config.run)}
        (config.folder / "study.json").write_text(json.dumps(note))
        studied.append(config)

    monkeypatch.setattr(studies, "run_study", study)
    config = StudyConfig(made_run(tmp_path))
    assert studies._studied(config) == studies._studied(config) and len(studied) == 1
    made_run(tmp_path, "other weights")
    studies._studied(config)
    assert len(studied) == 2
    note = json.loads((tmp_path / "study" / "study.json").read_text())
    del note["run"]  # as studies were once written
    (tmp_path / "study" / "study.json").write_text(json.dumps(note))
    studies._studied(config)
    assert len(studied) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": (0, 0)}, "--seeds must name at least one value, each once, got 0 0"),
        ({"seeds": ()}, "--seeds must name at least one value, each once, got"),
        ({"study": {"resamples": 1}}, "--resamples must be 0 or at least 2, got 1"),
        ({"study": {"resamples": -1}}, "--resamples must be 0 or at least 2, got -1"),
    ],
)
def test_what_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run_studies(StudiesConfig(tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_run_counts_once(tmp_path, capsys):
    folder = made_run(tmp_path / "run")
    assert main(["study", str(folder), str(tmp_path / "." / "run" / ".." / "run")]) == 2
    assert "RUN must name each folder once" in capsys.readouterr().err
