"""Checkpoints: what comes back, what does not fit, and a write that was cut."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from sae_kernels.nn.sae import TopKSAE
from sae_kernels.train import fit, load_sae, save_sae

D_IN, D_SAE, K = 8, 32, 4


@pytest.fixture(scope="module")
def data():
    return torch.randn(200, D_IN, generator=torch.Generator().manual_seed(3))


def new_sae(**options):
    torch.manual_seed(1)
    return TopKSAE(D_IN, D_SAE, K, **options)


def run(data, sae=None, **options):
    sae = new_sae() if sae is None else sae
    return sae, fit(sae, data, steps=10, batch_size=64, progress=False, **options)


def assert_same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key


def test_save_and_load(tmp_path, data):
    sae = new_sae(normalize="global", activation="abs", k_aux=3, aux_coef=0.1, dead_after=77)
    sae.fit_normalizer(data)
    run(data, sae)
    save_sae(sae, tmp_path / "sae")
    save_sae(sae, tmp_path / "sae")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sae"]
    loaded = load_sae(tmp_path / "sae")
    assert_same(sae, loaded)
    assert not loaded.training
    assert torch.equal(loaded(data), sae.eval()(data))
    assert (loaded.k, loaded.k_aux, loaded.aux_coef, loaded.dead_after) == (sae.k, 3, 0.1, 77)
    half = new_sae(dtype=torch.bfloat16)
    save_sae(half, tmp_path / "half")
    assert load_sae(tmp_path / "half").W_enc.dtype == torch.bfloat16


def test_a_run_loads_as_a_module(tmp_path, data):
    sae, _ = run(data, checkpoint=tmp_path / "run")
    assert_same(sae, load_sae(tmp_path / "run"))


def test_a_write_cut_between_its_renames_is_found(tmp_path):
    sae = new_sae()
    save_sae(sae, tmp_path / "sae")
    (tmp_path / "sae").rename(tmp_path / ".sae.old")
    assert_same(sae, load_sae(tmp_path / "sae"))
    save_sae(sae, tmp_path / "sae")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sae"]


def test_checkpoints_that_do_not_fit(tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(FileNotFoundError, match="no checkpoint there"):
        load_sae(tmp_path / "nothing")
    save_sae(new_sae(), tmp_path / "sae")
    weights = load_file(tmp_path / "sae" / "model.safetensors")
    weights["surplus"] = weights.pop("b_dec")
    save_file(weights, tmp_path / "sae" / "model.safetensors")
    with pytest.raises(ValueError, match="missing keys: b_dec; unexpected keys: surplus"):
        load_sae(tmp_path / "sae")
    save_sae(new_sae(), tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "config.json").read_text())
    config["sae"]["d_sae"] = 33
    (tmp_path / "sae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"W_enc is \(32, 8\) in the checkpoint and \(33, 8\) in the module"):
        load_sae(tmp_path / "sae")
    (tmp_path / "sae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_sae(tmp_path / "sae")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="holds something that is no checkpoint"):
        save_sae(new_sae(), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_only_a_checkpoint_is_replaced(tmp_path, data):
    """Not a folder with some config.json, nor a grid by one SAE, nor the reverse."""
    other = tmp_path / "model"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    (other / "tokenizer.json").write_text("{}")
    run(data, checkpoint=tmp_path / "one")
    fit({"a": new_sae(), "b": new_sae()}, data, steps=3, progress=False, checkpoint=tmp_path / "grid")
    for folder, why in (
        (other, r"model: holds something that is no checkpoint \(config.json, tokenizer.json\)"),
        (tmp_path / "grid", "grid: holds a grid, and one SAE would take its place"),
    ):
        before = sorted(file.name for file in folder.iterdir())
        with pytest.raises(FileExistsError, match=why):
            save_sae(new_sae(), folder)
        assert sorted(file.name for file in folder.iterdir()) == before
    grid = {"a": new_sae(), "b": new_sae()}
    with pytest.raises(FileExistsError, match="one: holds one SAE, and a grid would take its place"):
        fit(grid, data, steps=3, progress=False, checkpoint=tmp_path / "one")
    fit(grid, data, steps=3, progress=False, checkpoint=tmp_path / "grid")
    save_sae(new_sae(), tmp_path / "one")
    assert not (tmp_path / "one" / "training.pt").exists()


def test_what_others_put_beside_a_checkpoint_stays(tmp_path, data):
    """Also what a process had not yet brought over when it was killed."""
    place, grid = tmp_path / "one", {"a": new_sae(), "b": new_sae()}
    run(data, checkpoint=place)
    fit(grid, data, steps=3, progress=False, checkpoint=tmp_path / "grid")
    (place / "logs").mkdir()
    (place / "logs" / "events").write_text("1")
    (tmp_path / "grid" / "a" / "notes.txt").write_text("2")
    shutil.copytree(place, tmp_path / ".one.old")
    (tmp_path / ".one.old" / "late.txt").write_text("3")
    save_sae(new_sae(), place)
    fit({"b": new_sae()}, data, steps=3, progress=False, checkpoint=tmp_path / "grid")
    assert {file.name for file in place.iterdir()} == {"config.json", "model.safetensors", "logs", "late.txt"}
    assert (place / "logs" / "events").read_text() == "1"
    assert [file.name for file in (tmp_path / "grid" / "a").iterdir()] == ["notes.txt"]
    assert {file.name for file in tmp_path.iterdir()} == {"one", "grid"}


def test_checkpoints_of_old_runs_are_replaced(tmp_path):
    """Before variants and grids: no "variant" in config.json, Adam's state in training.pt."""
    save_sae(new_sae(), tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["variant"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    (tmp_path / "old" / "training.pt").write_bytes(b"")
    save_sae(new_sae(), tmp_path / "old")
    assert json.loads((tmp_path / "old" / "config.json").read_text())["variant"] == "topk"


def test_what_killed_writers_left_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    running = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    for name in (f".sae.new{ended.pid}", f".sae.new{running.pid}", f".other.new{ended.pid}"):
        (tmp_path / name).mkdir()
    save_sae(new_sae(), tmp_path / "sae")
    left = {f".sae.new{running.pid}", f".other.new{ended.pid}", "sae"}
    assert {path.name for path in tmp_path.iterdir()} == left
    running.communicate(b"\n")


def test_loading_leaves_the_random_state(tmp_path):
    save_sae(new_sae(), tmp_path / "sae")
    state = torch.get_rng_state()
    load_sae(tmp_path / "sae")
    assert torch.equal(torch.get_rng_state(), state)
