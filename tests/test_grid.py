"""Several SAEs trained on one stream of batches: each as if alone, one pass, resumable, its own lr."""

import pytest
import torch
from torch.nn.functional import normalize

from sae_kernels.nn.sae import TopKSAE
from sae_kernels.train import fit, load_sae

D_IN = 8
SIZES = {"k2-w4": (32, 2), "k4-w4": (32, 4), "k4-w8": (64, 4)}
SETTINGS = {"steps": 24, "batch_size": 64, "log_every": 5, "progress": False}
RATES = {"k2-w4": 1e-3, "k4-w4": 4e-3, "k4-w8": 2e-3}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data():
    g = torch.Generator().manual_seed(3)
    atoms = normalize(torch.randn(16, D_IN, generator=g), dim=1)
    return (torch.rand(512, 16, generator=g) * (torch.rand(512, 16, generator=g) < 0.15)) @ atoms


def grid():
    return {
        name: TopKSAE(D_IN, d_sae, k, generator=torch.Generator().manual_seed(i))
        for i, (name, (d_sae, k)) in enumerate(SIZES.items())
    }


def assert_same(a, b):
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key


class Counted:
    """The batches of a list, and how many were drawn."""

    def __init__(self, data, batches=24):
        self.data, self.drawn, self.batches = data, 0, batches

    def __iter__(self):
        for i in range(self.batches):
            self.drawn += 1
            yield self.data[(torch.arange(64) * 5 + i * 64) % len(self.data)]


def test_each_member_is_trained_as_if_alone_on_one_pass(data):
    members, source = grid(), Counted(data)
    results = fit(members, source, lr=RATES, **SETTINGS)
    assert source.drawn == 24 and list(results) == list(SIZES)
    for name, alone in grid().items():
        expected = fit(alone, Counted(data), lr=RATES[name], **SETTINGS)
        assert_same(alone, members[name])
        assert results[name].history == expected.history and results[name].steps == 24


def test_rows_carry_the_name_and_checkpoints_load(data, tmp_path):
    rows, members = [], grid()
    results = fit(members, data, log=rows.append, checkpoint=tmp_path / "grid", **SETTINGS)
    assert {row["sae"] for row in rows} == set(SIZES) and len(rows) == 5 * len(SIZES)
    for name, sae in members.items():
        assert [{k: v for k, v in row.items() if k != "sae"} for row in rows if row["sae"] == name] == results[
            name
        ].history
        assert_same(sae, load_sae(tmp_path / "grid" / name))
    with pytest.raises(ValueError, match="holds a grid: name one of its folders, k2-w4, k4-w4, k4-w8"):
        load_sae(tmp_path / "grid")


class Killed(Exception):
    pass


def test_a_killed_grid_resumes_bit_for_bit(data, tmp_path):
    def kill(row):
        if row["step"] >= 15:
            raise Killed

    whole, resumed = grid(), grid()
    expected = fit(whole, data, lr=RATES, **SETTINGS)
    run = {"lr": RATES, "checkpoint": tmp_path / "grid", **SETTINGS}
    with pytest.raises(Killed):
        fit(grid(), data, checkpoint_every=6, log=kill, **run)
    results = fit(resumed, data, resume=True, **run)
    for name in SIZES:
        assert_same(whole[name], resumed[name])
        assert results[name].history == expected[name].history


def test_one_that_stops_early_leaves_the_others_alone(data):
    """The scores of one member get worse: it stops at step 9 with the weights of step 3, and the others go on."""
    kept, improving = [], iter(range(0, -100, -1))

    def validate(sae):
        if sae.k == 2:
            kept.append(sae.W_enc.detach().clone())
            return float(len(kept))
        return 0.0 if sae.d_sae == 64 else float(next(improving))

    members, alone = grid(), grid()["k4-w8"]
    results = fit(members, data, lr=RATES, validate=validate, validate_every=3, patience=2, **SETTINGS)
    assert results["k2-w4"].stopped == "early stopping" and results["k2-w4"].steps == 9 and len(kept) == 3
    assert torch.equal(members["k2-w4"].W_enc, kept[0])
    assert results["k4-w4"].stopped == "finished" and results["k4-w4"].steps == 24
    options = {"validate": lambda sae: 0.0, "validate_every": 3, "patience": 2, **SETTINGS}
    assert fit(alone, data, lr=RATES["k4-w8"], **options).steps == results["k4-w8"].steps == 9
    assert_same(alone, members["k4-w8"])


def test_bad_grids(data, tmp_path):
    with pytest.raises(TypeError, match="sae must be a TopKSAE or a dict of named ones, got list"):
        fit(list(grid().values()), data, **SETTINGS)
    with pytest.raises(TypeError, match="dict of named ones"):
        fit({}, data, **SETTINGS)
    with pytest.raises(ValueError, match="a name in a grid is made of letters"):
        fit({"a/b": grid()["k2-w4"]}, data, **SETTINGS)
    with pytest.raises(ValueError, match="one d_in, got {'a': 8, 'b': 9}"):
        fit({"a": TopKSAE(8, 16, 2), "b": TopKSAE(9, 16, 2)}, data, **SETTINGS)
    with pytest.raises(ValueError, match=r"lr is given for \['k2'\] and the grid is"):
        fit(grid(), data, **{**SETTINGS, "lr": {"k2": 0.1}})
    with pytest.raises(ValueError, match="lr must be above 0, got -1"):
        fit(grid(), data, **{**SETTINGS, "lr": {**RATES, "k4-w8": -1}})
    fit(grid(), data, checkpoint=tmp_path / "grid", **SETTINGS)
    with pytest.raises(ValueError, match="holds a grid of k2-w4, k4-w4, k4-w8 and this run is of one SAE"):
        fit(grid()["k2-w4"], data, checkpoint=tmp_path / "grid", resume=True, **SETTINGS)
    with pytest.raises(ValueError, match=r"this run \(k4-w4\) is not the one in .*: lr was 0.001 and is 0.004"):
        fit(grid(), data, checkpoint=tmp_path / "grid", resume=True, lr={**RATES, "k2-w4": 1e-3}, **SETTINGS)
