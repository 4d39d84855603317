"""The training loop: what each option does, exact resumption from every source, checkpoints that fit or say why not."""

import math
import os
import signal

import pytest
import torch
from torch import nn

from sae_kernels.eval.reconstruction import evaluate_reconstruction
from sae_kernels.nn.sae import TopKSAE
from sae_kernels.train import Interrupted, fit, from_model, load_sae, save_sae
from sae_kernels.train.recipe import Recipe
from sae_kernels.train.sources import CallableSource, IteratorSource, TensorSource, as_source, mix_seed

pytestmark = pytest.mark.usefixtures("one_thread")

D_IN, D_SAE, K = 8, 32, 4


@pytest.fixture(scope="module")
def data():
    """Sparse mixtures of 16 directions: a SAE has something to find."""
    g = torch.Generator().manual_seed(3)
    atoms = torch.nn.functional.normalize(torch.randn(16, D_IN, generator=g), dim=1)
    weights = torch.rand(512, 16, generator=g) * (torch.rand(512, 16, generator=g) < 0.15)
    return weights @ atoms


def new_sae(**options):
    torch.manual_seed(1)
    return TopKSAE(D_IN, D_SAE, K, **options)


def run(source, sae=None, **options):
    sae = new_sae() if sae is None else sae
    settings = {"steps": 24, "batch_size": 64, "log_every": 5, "progress": False, **options}
    return sae, fit(sae, source, **settings)


def assert_same(a, b):
    for key, value in a.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b.state_dict()[key]), key


class Counter:
    """An iterator whose place can be kept; raises KeyboardInterrupt once, before batch number `cut`."""

    def __init__(self, data, cut=None):
        self.data, self.cut, self.n = data, cut, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.n == self.cut:
            self.cut = None
            raise KeyboardInterrupt
        self.n += 1
        return self.data[torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.n))[:64]]

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


class Batches:
    """The same batches at every pass, with no way to keep a place in them."""

    def __init__(self, data, cut=None):
        self.data, self.cut, self.drawn = data, cut, 0

    def __iter__(self):
        for part in self.data.split(100):
            if self.drawn == self.cut:
                self.cut = None
                raise KeyboardInterrupt
            self.drawn += 1
            yield part


def test_training_learns(data):
    sae = new_sae(normalize="standardize")
    before = evaluate_reconstruction(sae, data)["fvu"]
    _, result = run(data, sae, steps=400, lr=3e-3)
    after = evaluate_reconstruction(sae, data)["fvu"]
    assert after < 0.5 * before
    assert result.steps == 400 and result.stopped == "finished" and result.seconds > 0
    norms = sae.W_dec.detach().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-5, rtol=0)


def test_history_rows(data):
    rows = []
    _, result = run(data, log=rows.append)
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 24]
    assert rows == result.history
    assert set(rows[0]) == {"step", "loss", "fvu", "aux", "l0", "dead_share", "lr"}
    assert 0 < rows[0]["l0"] <= K and 0 <= rows[0]["dead_share"] <= 1
    assert rows[-1]["fvu"] < rows[0]["fvu"]


def test_same_seed_same_bits_and_other_seed_other_bits(data):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    a, first = run(data, seed=5)
    torch.rand(7)
    b, second = run(data, seed=5)
    c, _ = run(data, seed=6)
    assert_same(a, b)
    assert first.history == second.history
    assert not torch.equal(a.W_enc, c.W_enc)
    torch.set_rng_state(state)
    run(data, new_sae_without_seed())
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is left as it was"


def new_sae_without_seed():
    with torch.random.fork_rng():
        return new_sae()


@pytest.mark.parametrize(
    "option", [{"lr": 2e-3}, {"betas": (0.5, 0.9)}, {"warmup": 0.5}, {"decay": 0.9}, {"clip": 1e-3}, {"batch_size": 32}]
)
def test_every_option_changes_the_result(data, option):
    a, _ = run(data)
    b, _ = run(data, **option)
    assert not torch.equal(a.W_enc, b.W_enc)


def test_schedule():
    plan = Recipe(100, 1, 1.0, (0.9, 0.999), 0.1, 0.2, None, 0, 1, None, None, None, "")
    factors = [plan.factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1 and factors[80] == 1
    assert factors[90] == pytest.approx(0.5) and factors[99] == pytest.approx(0.05) and factors[100] == 0
    flat = Recipe(100, 1, 1.0, (0.9, 0.999), 0.0, 0.0, None, 0, 1, None, None, None, "")
    assert {flat.factor(step) for step in range(101)} == {1.0}


def test_tensor_epochs_are_exact():
    x = torch.arange(10.0)[:, None]
    source = TensorSource(x, 4, seed=1)
    drawn = torch.cat([source.next() for _ in range(5)])[:, 0]
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
    again = TensorSource(x, 4, seed=1)
    again.load_state_dict({"drawn": 8})
    assert torch.equal(again.next()[:, 0], drawn[8:12])
    assert TensorSource(x, 4096).next().shape == (10, 1)


def test_seeds_are_mixed():
    assert len({mix_seed(seed, step) for seed in range(100) for step in range(100)}) == 10000


class Model(nn.Module):
    """Token ids [B, T] -> [B, T, D_IN] at `body`; id 0 is padding."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.body = nn.Embedding(50, D_IN, _weight=torch.randn(50, D_IN, generator=g))

    def forward(self, ids):
        return self.body(ids).sum(1)


def token_batch(step, generator):
    ids = torch.randint(1, 50, (16, 6), generator=generator)
    ids[:, : step % 3] = 0
    return ids


def sources(data):
    return {
        "tensor": lambda cut: data,
        "iterator with a place": lambda cut: Counter(data, cut),
        "iterable": lambda cut: Batches(data, cut),
        "callable": lambda cut: lambda step, g: data[torch.randint(len(data), (64,), generator=g)],
        "model": lambda cut: from_model(
            Model(), "body", token_batch, mask=lambda ids: ids != 0, batch_size=64, buffer_batches=3, seed=2
        ),
    }


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["tensor", "iterator with a place", "iterable", "callable", "model"])
@pytest.mark.parametrize("at", [6, 10])
def test_a_killed_run_resumes_bit_for_bit(data, tmp_path, kind, at):
    make = sources(data)[kind]
    whole, expected = run(make(None))

    def kill(row):
        if row["step"] >= 15:
            raise Killed

    with pytest.raises(Killed):
        run(make(None), checkpoint=tmp_path / "run", checkpoint_every=at, log=kill)
    torch.rand(3)
    resumed, result = run(make(None), new_sae(), checkpoint=tmp_path / "run", resume=True)
    assert_same(whole, resumed)
    assert result.history == expected.history
    assert result.steps == 24


@pytest.mark.parametrize("kind", ["iterator with a place", "iterable"])
def test_ctrl_c_leaves_a_checkpoint_that_resumes(data, tmp_path, kind):
    make = sources(data)[kind]
    whole, expected = run(make(None))
    with pytest.raises(Interrupted, match="interrupted after step 7; .*run resumes it") as caught:
        run(make(7), checkpoint=tmp_path / "run")
    assert caught.value.step == 7 and isinstance(caught.value, KeyboardInterrupt)
    resumed, result = run(make(None), new_sae(), checkpoint=tmp_path / "run", resume=True)
    assert_same(whole, resumed)
    assert result.history == expected.history


def test_a_real_signal_waits_for_the_step(data, tmp_path):
    whole, _ = run(data)

    def press(row):
        if row["step"] == 10:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        run(data, checkpoint=tmp_path / "run", log=press)
    assert caught.value.step == 10
    assert signal.getsignal(signal.SIGINT) is handler
    resumed, _ = run(data, new_sae(), checkpoint=tmp_path / "run", resume=True)
    assert_same(whole, resumed)
    with pytest.raises(Interrupted, match="no checkpoint was asked for"):
        run(data, log=press)


def test_resuming_with_other_settings_names_them(data, tmp_path):
    run(data, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match=r"lr was 0.001 and is 0.01; seed was 0 and is 3"):
        run(data, checkpoint=tmp_path / "run", resume=True, lr=0.01, seed=3)
    with pytest.raises(ValueError, match=r"source was 'tensor \(512, 8\)' and is 'tensor \(511, 8\)'"):
        run(data[1:], checkpoint=tmp_path / "run", resume=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint there"):
        run(data, checkpoint=tmp_path / "elsewhere", resume=True)
    save_sae(new_sae(), tmp_path / "module")
    with pytest.raises(ValueError, match="a finished module, not a training run"):
        run(data, checkpoint=tmp_path / "module", resume=True)


def test_resuming_an_sae_of_other_options_names_them(data, tmp_path):
    fit(TopKSAE(D_IN, D_SAE, K, aux_coef=0.0), data, steps=10, progress=False, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="aux_coef was 0.0 and is 0.5; dead_after was .* and is 7"):
        other = TopKSAE(D_IN, D_SAE, K, aux_coef=0.5, dead_after=7)
        fit(other, data, steps=10, progress=False, checkpoint=tmp_path / "run", resume=True)
    same = TopKSAE(D_IN, D_SAE, K, aux_coef=0.0)
    same.refit = 4  # of reading alone
    assert fit(same, data, steps=10, progress=False, checkpoint=tmp_path / "run", resume=True).steps == 10


def test_a_place_that_is_taken_is_told_before_training(data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    (tmp_path / "file").write_text("")
    for taken in ("mine", "file"):
        with pytest.raises(FileExistsError, match="holds something that is no checkpoint"):
            fit(
                TopKSAE(D_IN, D_SAE, K),
                lambda *_: pytest.fail("a batch was drawn"),
                steps=9,
                checkpoint=tmp_path / taken,
            )


def test_compiled_modules_are_saved_under_their_own_names(data, tmp_path):
    sae = torch.compile(TopKSAE(D_IN, D_SAE, K))
    fit(sae, data, steps=5, progress=False, checkpoint=tmp_path / "run")
    assert torch.equal(load_sae(tmp_path / "run").W_dec, sae.W_dec)
    save_sae(sae, tmp_path / "saved")
    assert torch.equal(load_sae(tmp_path / "saved").W_dec, sae.W_dec)


def test_links_to_folders_stay_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        sae = TopKSAE(D_IN, D_SAE, K)
        save_sae(sae, tmp_path / "link")
        for name in ("link", "real"):
            assert torch.equal(load_sae(tmp_path / name).W_dec, sae.W_dec)
    assert (tmp_path / "link").is_symlink()


def test_batches_in_lists_and_with_a_graph(data):
    """A DataLoader of a TensorDataset gives lists of one; what a model gives without no_grad is cut off from it."""
    batches = list(data.split(64))
    plain, listed, with_graph = (new_sae() for _ in range(3))
    one = torch.ones((), requires_grad=True)
    for sae, source in ((plain, batches), (listed, [[b] for b in batches]), (with_graph, [b * one for b in batches])):
        fit(sae, source, steps=20, progress=False)
        assert torch.equal(sae.W_dec, plain.W_dec)
    assert one.grad is None


def test_validation_that_is_nan_is_never_the_best(data):
    found = iter([math.nan, 3.0, math.nan, 2.0])
    result = fit(
        TopKSAE(D_IN, D_SAE, K), data, steps=20, progress=False, validate=lambda _: next(found), validate_every=5
    )
    assert result.best == 2.0


def test_resuming_a_finished_run_changes_nothing(data, tmp_path):
    whole, expected = run(data, checkpoint=tmp_path / "run")
    again, result = run(data, new_sae(), checkpoint=tmp_path / "run", resume=True)
    assert_same(whole, again)
    assert result.history == expected.history


def test_validation_stops_early_and_keeps_the_best(data, tmp_path):
    scores = iter([0.5, 0.4, 0.45, 0.41, 0.3])
    kept = {}

    def validate(sae):
        assert not sae.training
        score = next(scores)
        kept[score] = sae.W_enc.detach().clone()
        return score

    sae, result = run(data, validate=validate, validate_every=3, patience=2, checkpoint=tmp_path / "run")
    assert result.stopped == "early stopping" and result.steps == 12 and result.best == 0.4
    assert torch.equal(sae.W_enc, kept[0.4]) and not torch.equal(kept[0.4], kept[0.41])
    assert [row["validation"] for row in result.history if "validation" in row] == [0.5, 0.4, 0.45, 0.41]
    with pytest.raises(ValueError, match="need validate"):
        run(data, patience=2)


def test_validation_on_a_tensor_is_its_fvu(data):
    sae, result = run(data[100:], steps=20, validate=data[:100], validate_every=20)
    assert result.history[-1]["validation"] == pytest.approx(evaluate_reconstruction(sae, data[:100])["fvu"], rel=1e-12)


def test_early_stopping_resumes_exactly(data, tmp_path):
    options = {"validate": data[:64], "validate_every": 4, "patience": 3}
    whole, expected = run(data, **options)

    def kill(row):
        if row["step"] >= 16:
            raise Killed

    with pytest.raises(Killed):
        run(data, checkpoint=tmp_path / "run", checkpoint_every=6, log=kill, **options)
    resumed, result = run(data, new_sae(), checkpoint=tmp_path / "run", resume=True, **options)
    assert_same(whole, resumed)
    assert (result.history, result.best) == (expected.history, expected.best)


def test_masked_positions_never_enter():
    source = from_model(Model(), "body", token_batch, mask=lambda ids: ids != 0, batch_size=64, buffer_batches=2)
    rows = torch.cat([source.next() for _ in range(30)])
    table = source.model.body.weight.detach()
    assert not (rows == table[0]).all(1).any()
    assert (rows[:, None] == table[1:]).all(2).any(1).all(), "every row is a real position"
    unmasked = from_model(Model(), "body", token_batch, batch_size=64, buffer_batches=2)
    assert (torch.cat([unmasked.next() for _ in range(30)]) == table[0]).all(1).any()


def test_a_source_that_is_ahead_of_the_checkpoint_goes_back(data, tmp_path):
    """The same object again, after a run that died some steps after its checkpoint."""
    net, batches = nn.Sequential(nn.Linear(D_IN, D_IN)), list(data.split(8))

    def source():
        return from_model(net, "0", batches, batch_size=8, buffer_batches=4)

    def die(row):
        if row["step"] == 15:
            raise Killed

    whole, again = run(source())[0], source()
    with pytest.raises(Killed):
        run(again, checkpoint=tmp_path / "run", checkpoint_every=10, log=die)
    assert torch.equal(run(again, checkpoint=tmp_path / "run", resume=True)[0].W_enc, whole.W_enc)
    iterator = IteratorSource(iter(batches))
    for _ in range(3):
        iterator.next()
    with pytest.raises(ValueError, match="cannot go back from batch 3 to 1"):
        iterator.load_state_dict({"drawn": 1})


def test_model_source_leaves_every_mode_as_it_was():
    net = nn.Sequential(nn.Linear(D_IN, D_IN), nn.BatchNorm1d(D_IN)).train()
    net[1].eval()
    from_model(net, "0", [torch.randn(64, D_IN)], batch_size=8, buffer_batches=2).next()
    assert net.training and net[0].training and not net[1].training


def test_model_source_mode_and_dry_mask():
    model = Model().train()
    source = from_model(model, "body", [torch.ones(2, 3, dtype=torch.int64)], mask=lambda ids: ids == 0, batch_size=4)
    with pytest.raises(ValueError, match="1000 batches in a row left no activation at 'body'"):
        source.next()
    assert model.training


def test_progress_bar(data, capsys):
    run(data, progress=True)
    shown = capsys.readouterr().err
    assert "24/24" in shown and "fvu=" in shown and "dead_share=" in shown
    run(data, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "option, message",
    [
        ({"steps": 0}, "steps must be an int of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an int of at least 1, got 0"),
        ({"log_every": 1.5}, "log_every must be an int of at least 1, got 1.5"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"warmup": 1.5}, "warmup is a share of the steps"),
        ({"decay": -0.1}, "decay is a share of the steps"),
        ({"clip": 0}, "clip must be above 0"),
        ({"resume": True}, "need checkpoint"),
        ({"checkpoint_every": 0, "checkpoint": "x"}, "checkpoint_every must be at least 1"),
    ],
)
def test_bad_settings(data, option, message):
    with pytest.raises(ValueError, match=message):
        run(data, **option)


def test_bad_sources(data):
    with pytest.raises(TypeError, match="source must be a tensor .* got int"):
        run(3)
    with pytest.raises(TypeError, match="got ndarray: torch.from_numpy makes one"):
        run(data.numpy())
    for batch, came in (([data, data], "list of 2"), ({"x": data}, "dict"), ("text", "str")):
        with pytest.raises(TypeError, match=f"source must give tensors .* it gave a {came}"):
            run([batch])
    with pytest.raises(ValueError, match="at least one row"):
        run(torch.zeros(0, D_IN))
    with pytest.raises(TypeError, match="floating-point"):
        run(torch.zeros(4, D_IN, dtype=torch.int64))
    with pytest.raises(ValueError, match="source is empty"):
        run([])
    with pytest.raises(ValueError, match="source ended after 2 batches"):
        run(iter([data[:10], data[10:20]]))
    with pytest.raises(ValueError, match=r"9"):
        run(torch.zeros(4, 9))
    with pytest.raises(FloatingPointError, match="the loss is nan before step 5"):
        run(data * float("nan"))
    assert isinstance(as_source(lambda step, g: data, 1, 0), CallableSource)
    assert isinstance(as_source([data], 1, 0), IteratorSource)
