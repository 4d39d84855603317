"""The training loops of the reference recommenders: quality, seeds, early stopping, interruption, bad input."""

import math

import pytest
import torch

from sae_kernels.data.histories import Histories
from sae_kernels.data.simulate import simulate
from sae_kernels.data.split import leave_last_out, split_targets, split_users
from sae_kernels.eval.ranking import rank_metrics
from sae_kernels.recommenders import ELSA, MultVAE, SASRec, fit_collaborative, fit_sequential

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    simulated = simulate(1500, 200, 8, seed=1)
    histories = simulated.histories()
    train, held = split_users(simulated, 0.2)
    return histories.select(train), histories.select(held)


def fresh(kind, seed=0):
    torch.manual_seed(seed)
    return {
        "elsa": lambda: ELSA(200, 32),
        "multvae": lambda: MultVAE(200, 32),
        "sasrec": lambda: SASRec(200, 32, max_len=30),
    }[kind]()


def fit(kind, model, histories, **options):
    if kind == "sasrec":
        return fit_sequential(model, histories, **{"epochs": 8, "lr": 3e-3, "batch_size": 64, **options})
    return fit_collaborative(model, histories, **{"epochs": 10, "lr": 3e-3, "batch_size": 128, **options})


@pytest.mark.parametrize("kind", ["elsa", "multvae", "sasrec"])
def test_training_beats_popularity(kind, data):
    train, held = data
    split = leave_last_out(held) if kind == "sasrec" else split_targets(held)
    model = fresh(kind)
    result = fit(kind, model, train)
    popular = train.flat.bincount(minlength=200).float()
    base = rank_metrics(lambda rows: popular.repeat(len(rows), 1), split.inputs, split.targets)
    got = rank_metrics(model, split.inputs, split.targets)
    assert got["ndcg@20"] > 1.15 * base["ndcg@20"]
    assert result.losses[-1] < result.losses[0] and len(result.losses) == (8 if kind == "sasrec" else 10)
    assert not model.training and result.seconds > 0


@pytest.mark.parametrize("kind", ["elsa", "multvae", "sasrec"])
def test_a_seed_fixes_the_weights_and_leaves_the_global_state(kind, data):
    part = data[0].select(torch.arange(300))
    models = [fresh(kind) for _ in range(3)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for model, seed in zip(models, (0, 0, 1), strict=True):
        fit(kind, model, part, epochs=2, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    first, second, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_sampled_negatives_train_too(data):
    losses = fit("sasrec", fresh("sasrec"), data[0], epochs=4, negatives=50).losses
    # 51 candidates: a model that knows nothing has log(51) = 3.93
    assert losses[-1] < losses[0] and losses[-1] < 3.9


def test_early_stopping_puts_the_best_weights_back(data):
    model = fresh("elsa")
    scores, kept = iter([1.0, 3.0, 2.0, 2.5, 9.0]), []

    def validate(model):
        assert not model.training
        kept.append(model.encoder.weight.detach().clone())
        return next(scores)

    result = fit("elsa", model, data[0], epochs=5, validate=validate, patience=2)
    assert result.scores == [1.0, 3.0, 2.0, 2.5] and result.best_epoch == 1
    assert torch.equal(model.encoder.weight, kept[1]) and not torch.equal(kept[1], kept[3])
    scores = iter([math.nan, 0.5, math.nan, 0.4])  # NaN is no best score
    assert fit("elsa", fresh("elsa"), data[0], epochs=4, validate=lambda _: next(scores), patience=9).best_epoch == 1


def test_ctrl_c_passes_on_and_leaves_a_usable_model(data):
    model = fresh("elsa")
    before = model.encoder.weight.detach().clone()

    def interrupted(steps):
        for step in steps:
            if step == 3:
                raise KeyboardInterrupt
            yield step

    with pytest.raises(KeyboardInterrupt):
        fit("elsa", model, data[0], progress=interrupted)
    assert not model.training and torch.isfinite(model.encoder.weight).all()
    assert not torch.equal(model.encoder.weight, before)


def test_progress_sees_every_step_and_the_loss(data):
    class Bar:
        def __init__(self, steps):
            self.steps, self.seen, self.notes = steps, 0, []

        def __iter__(self):
            for step in self.steps:
                self.seen += 1
                yield step

        def set_postfix(self, loss):
            self.notes.append(loss)

    bars = []
    result = fit("elsa", fresh("elsa"), data[0], epochs=2, progress=lambda steps: bars.append(Bar(steps)) or bars[0])
    assert bars[0].seen == 2 * 10 and bars[0].notes == [f"{loss:.4f}" for loss in result.losses]


def test_bad_training_arguments(data):
    train, model = data[0], fresh("elsa")
    with pytest.raises(ValueError, match="epochs must be an int of at least 1, got 0"):
        fit_collaborative(model, train, epochs=0)
    with pytest.raises(ValueError, match="lr must be positive"):
        fit_collaborative(model, train, lr=0)
    with pytest.raises(ValueError, match="no histories"):
        fit_collaborative(model, Histories.from_lists([], 200))
    with pytest.raises(ValueError, match="histories have item 299 and the model knows 200 items"):
        fit_collaborative(model, Histories.from_lists([[299]], 300))
    with pytest.raises(ValueError, match="no sequence has two items"):
        fit_sequential(fresh("sasrec"), Histories.from_lists([[1], []], 200))
    with pytest.raises(ValueError, match="negatives must be None or at least 1"):
        fit_sequential(fresh("sasrec"), train, negatives=0)
    with pytest.raises(ValueError, match="the model knows 200 items and the histories have 300"):
        rank_metrics(model, Histories.from_lists([[1]], 300), Histories.from_lists([[2]], 300))
