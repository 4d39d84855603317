"""What settings may be, and which of them a resumed run must agree on."""

import numpy as np
import pytest
import torch
from torch import nn

from sae_kernels import cli
from sae_kernels.data.extract import ActivationStream
from sae_kernels.nn import JumpReLUSAE, TopKSAE
from sae_kernels.train import fit, from_model, load_sae, save_sae
from sae_kernels.train.sources import IteratorSource

pytestmark = pytest.mark.usefixtures("one_thread")

D_IN, D_SAE, K = 8, 32, 4


@pytest.fixture(scope="module")
def data():
    return torch.randn(200, D_IN, generator=torch.Generator().manual_seed(3))


def new_sae(kind=TopKSAE, **options):
    return kind(D_IN, D_SAE, K, generator=torch.Generator().manual_seed(1), **options)


def test_numbers_of_any_kind(data, tmp_path):
    lr = torch.tensor(1e-3)
    numbers = {
        "steps": np.int64(12), "batch_size": np.int32(64), "lr": lr, "betas": np.array([0.9, 0.99]),
        "warmup": np.float32(0.25), "decay": np.float64(0.5), "clip": np.float64(1), "seed": np.int64(3),
        "log_every": np.int64(4), "validate_every": np.int64(4), "patience": np.int64(9), "validate": data[:50],
    }  # fmt: skip
    options = {"progress": False, "checkpoint": tmp_path / "run"}
    sae = new_sae(JumpReLUSAE, aux_coef=np.float32(0.5), bandwidth=np.float32(0.25), l0_coef=np.float64(2))
    result = fit(sae, data, **numbers, **options)
    assert lr == torch.tensor(1e-3) and sae.aux_coef == 0.5
    plain = {name: n if name == "validate" else n.tolist() for name, n in numbers.items()}
    again = new_sae(JumpReLUSAE, aux_coef=0.5, bandwidth=0.25, l0_coef=2.0)
    assert fit(again, data, **plain, **options, resume=True).history == result.history
    save_sae(sae, tmp_path / "sae")
    assert load_sae(tmp_path / "sae").l0_coef == 2.0


def test_one_module_under_two_names(data):
    sae = new_sae()
    with pytest.raises(ValueError, match="one module is in it under several names"):
        fit({"a": sae, "b": torch.compile(sae)}, data, steps=3, progress=False)


def test_an_sae_of_another_dtype(data, tmp_path):
    fit(new_sae(), data, steps=3, progress=False, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="dtype was 'float32' and is 'float64'"):
        fit(new_sae().double(), data, steps=3, progress=False, checkpoint=tmp_path / "run", resume=True)


def test_sources_tell_what_decides_their_batches():
    net, x = nn.Sequential(nn.Linear(D_IN, D_IN)), torch.randn(32, D_IN)

    def source(**options):
        return from_model(net, "0", [x], **options).describe()

    def stream(inputs=x, **options):
        return ActivationStream(net, "0", inputs, **options).describe()

    options = ({}, {"batch_size": 16}, {"buffer_batches": 4}, {"seed": 1})
    assert len({source(**one) for one in options}) == len(options)
    options = ({}, {"batch_rows": 16}, {"buffer_rows": 2048}, {"shuffle": 1}, {"batch_size": 8}, {"inputs": x + 1})
    assert len({stream(**one) for one in options}) == len(options)


def test_a_restored_buffer_follows_the_model():
    """The meta device stands for a GPU: checkpoints are read to the CPU."""
    net, x = nn.Sequential(nn.Linear(D_IN, D_IN, device="meta")), torch.empty(32, D_IN, device="meta")

    def source():
        return from_model(net, "0", [x], batch_size=16, buffer_batches=3)

    first, resumed = source(), source()
    first.next()
    state = first.state_dict()
    state["buffer"] = torch.zeros(state["buffer"].shape)
    resumed.load_state_dict(state)
    batches = [resumed.next() for _ in range(6)]
    assert batches[0].device.type == "cpu" and batches[-1].device.type == "meta"


def test_a_stateful_iterable_is_iterated_anew():
    class Numbers:
        start = 0

        def __iter__(self):
            for number in range(self.start + 1, 100):
                self.start = number
                yield number

        def state_dict(self):
            return {"start": self.start}

        def load_state_dict(self, state):
            self.start = state["start"]

    source = IteratorSource(Numbers())
    assert [source.next() for _ in range(3)] == [1, 2, 3]
    state = source.state_dict()
    assert [source.next() for _ in range(2)] == [4, 5]
    source.load_state_dict(state)
    assert [source.next() for _ in range(2)] == [4, 5]


def test_resuming_keeps_refit(tmp_path, data):
    torch.save(data, tmp_path / "acts.pt")
    train = f"train {tmp_path}/acts.pt --width 4 --k 4 --steps 5 --batch-size 64 --quiet".split()
    for kind, place in (([], "one"), (["--grid", "k=2,4"], "grid")):
        command, member = [*train, *kind, "--out", str(tmp_path / place)], tmp_path / place / ("k4" if kind else "")
        for more, wanted in (
            (["--refit", "3"], 3), (["--resume"], 3), (["--resume", "--refit", "2"], 2), (["--resume"], 2), ([], 0),
        ):  # fmt: skip
            assert cli.main([*command, *more]) == 0
            assert load_sae(member).refit == wanted
