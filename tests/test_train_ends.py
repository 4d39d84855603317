"""How a run ends: diverged, out of batches, or by Ctrl-C at its last step."""

import os
import signal

import pytest
import torch

from sae_kernels.nn.sae import TopKSAE
from sae_kernels.train import Interrupted, fit, load_sae

pytestmark = pytest.mark.usefixtures("one_thread")

D_IN, D_SAE, K = 8, 32, 4


@pytest.fixture(scope="module")
def data():
    return torch.randn(200, D_IN, generator=torch.Generator().manual_seed(3))


def new_sae():
    return TopKSAE(D_IN, D_SAE, K, generator=torch.Generator().manual_seed(1))


def run(sae, source, **options):
    return fit(sae, source, **{"steps": 24, "log_every": 12, "progress": False, **options})


def turning_nan(data, step):
    return lambda number, _: data if number < step else data * float("nan")


@pytest.mark.parametrize("last", [8, 24])
def test_weights_that_are_not_finite_replace_no_checkpoint(data, tmp_path, last):
    """Between two history rows, and after the last one."""
    sae = new_sae()

    def spoil(row):
        if row["step"] == last:
            sae.W_enc.data[3, 2] = float("nan")

    with pytest.raises(FloatingPointError, match=f"the loss or the weights are not finite after step {last}"):
        run(sae, data, log=spoil, log_every=8, checkpoint=tmp_path / "run", checkpoint_every=4)
    assert bool(load_sae(tmp_path / "run").W_enc.isfinite().all())
    assert torch.load(tmp_path / "run" / "training.pt")["step"] == last - 4


def test_a_grid_names_the_sae_that_diverged(data, tmp_path):
    saes = {"calm": new_sae(), "wild": new_sae()}

    def spoils(number, _):
        if number == 5:
            saes["wild"].W_enc.data[0] = float("inf")
        return data

    with pytest.raises(FloatingPointError, match="^wild: the loss or the weights are not finite after step 8"):
        run(saes, spoils, checkpoint=tmp_path / "run", checkpoint_every=4)
    assert torch.load(tmp_path / "run" / "training.pt")["step"] == 4
    with pytest.raises(FloatingPointError, match="^calm: the loss is nan before step 12"):
        run({"calm": new_sae()}, turning_nan(data, 3))


def test_a_best_that_was_put_back_is_kept(data, tmp_path):
    """Stopped early on NaN: the weights that stay are the best ones."""
    scores = iter([1.0, float("nan"), float("nan")])
    result = run(
        new_sae(), turning_nan(data, 3), validate=lambda _: next(scores), validate_every=2, patience=2,
        checkpoint=tmp_path / "run",
    )  # fmt: skip
    assert result.stopped == "early stopping" and result.best == 1.0
    assert bool(load_sae(tmp_path / "run").W_enc.isfinite().all())


def test_a_source_of_next_that_ends_is_named(data):
    class Short:
        drawn = 0

        def next(self):
            self.drawn += 1
            if self.drawn > 3:
                raise StopIteration
            return data

        def state_dict(self):
            return {}

        def load_state_dict(self, state): ...

        def describe(self):
            return "short"

    with pytest.raises(ValueError, match="source ended after 3 batches"):
        run(new_sae(), Short())


def test_ctrl_c_at_the_end_is_not_swallowed(data, tmp_path):
    def press(row):
        if row["step"] == 24:
            os.kill(os.getpid(), signal.SIGINT)

    sae = new_sae()
    with pytest.raises(Interrupted, match="after step 24; .*run resumes it") as caught:
        run(sae, data, log=press, checkpoint=tmp_path / "run")
    assert caught.value.step == 24 and torch.equal(load_sae(tmp_path / "run").W_enc, sae.W_enc)
    assert run(new_sae(), data, checkpoint=tmp_path / "run", resume=True).steps == 24


def test_ctrl_c_while_the_last_checkpoint_is_written(data, tmp_path, monkeypatch):
    from sae_kernels.train.run import Run

    save = Run.save

    def pressed(run):
        os.kill(os.getpid(), signal.SIGINT)
        save(run)

    monkeypatch.setattr(Run, "save", pressed)
    with pytest.raises(Interrupted, match="after step 24"):
        run(new_sae(), data, checkpoint=tmp_path / "run")
    assert torch.load(tmp_path / "run" / "training.pt")["step"] == 24
