"""Checkpoints: what comes back, what does not fit, and a write that was cut."""

import json

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
