"""The simulator: sizes, seeds, and that every planted effect is in the data and can be switched off."""

import pytest
import torch

from sae_kernels.data.interactions import Interactions
from sae_kernels.data.simulate import simulate


@pytest.fixture(scope="module")
def simulated():
    return simulate(1500, 400, 12, seed=5)


def test_simulated_shapes_and_seed(simulated):
    labels = simulated.concepts.labels
    assert (simulated.n_users, simulated.n_items, labels.shape) == (1500, 400, (400, 12))
    assert int(labels.sum(1).min()) == 1 and int(labels.sum(1).max()) == 3 and int(labels.sum(0).min()) >= 20
    assert len(set(simulated.item_titles)) == 400
    histories = simulated.histories()
    assert int(histories.lengths.min()) >= 1 and float(histories.batch().sum()) == len(simulated)
    # log-normal with mean 30 and sigma 0.5: standard error 30 * 0.53 / sqrt(1500) = 0.4, and a few lost steps
    assert float(histories.lengths.float().mean()) == pytest.approx(30, abs=2.5)
    again, other = simulate(1500, 400, 12, seed=5), simulate(1500, 400, 12, seed=6)
    assert torch.equal(simulated.items, again.items) and not torch.equal(simulated.items[:500], other.items[:500])


def test_popularity_is_skewed():
    counts = [
        simulate(1500, 400, 12, popularity=p).items.bincount(minlength=400).sort(descending=True).values for p in (0, 1)
    ]
    flat, steep = (float(c[:40].sum() / c.sum()) for c in counts)
    assert steep > 1.8 * flat


def shares(simulated):
    """[n_users, n_concepts]: the concepts of what each user took, a row sums to 1."""
    histories, labels = simulated.histories(), simulated.concepts.labels.float()
    taken = histories.batch() @ (labels / labels.sum(1, keepdim=True))
    return taken / taken.sum(1, keepdim=True)


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_users_follow_their_tastes_and_tastes_come_in_groups(simulated):
    taken, taste = shares(simulated), simulated.user_taste
    assert taste.sum(1).tolist() == pytest.approx([1] * 1500, abs=1e-5)
    assert correlation(taken, taste) > 0.5
    assert abs(correlation(taken, taste[torch.randperm(1500, generator=torch.Generator().manual_seed(0))])) < 0.1
    log = taste.log()
    within, across = correlation(log[:, 0], log[:, 1]), correlation(log[:, 0], log[:, 5])
    assert within > across + 0.2


def test_concepts_co_occur_within_groups(simulated):
    labels = simulated.concepts.labels.float()
    together = labels.T @ labels
    group = torch.arange(12) // 4
    same = (group[:, None] == group) & ~torch.eye(12, dtype=torch.bool)
    assert together[same].mean() > 3 * together[group[:, None] != group].mean()


def follow_rate(simulated):
    """How often an item shares a concept with the one before it."""
    histories, labels = simulated.histories(), simulated.concepts.labels
    owner = histories.row_ids()
    inside = owner[1:] == owner[:-1]
    return float((labels[histories.flat[1:]] & labels[histories.flat[:-1]]).any(1)[inside].float().mean())


def test_order_effects_can_be_seen_and_switched_off(simulated):
    shuffled = Interactions(**{**vars(simulated), "order": torch.randperm(len(simulated))})
    assert follow_rate(simulated) > follow_rate(shuffled) + 0.03
    none = simulate(1500, 400, 12, seed=5, order=0.0)
    mixed = Interactions(**{**vars(none), "order": torch.randperm(len(none))})
    assert abs(follow_rate(none) - follow_rate(mixed)) < 0.02
    assert simulated.transitions.sum(1).tolist() == pytest.approx([1] * 12, abs=1e-6)


def test_simulator_options_take_effect():
    short = simulate(300, 200, 8, mean_length=8).histories().lengths.float().mean()
    assert float(short) < 12
    flat, sharp = (simulate(300, 200, 8, taste=t).user_taste.amax(1).mean() for t in (0.5, 4.0))
    assert sharp > 2 * flat
    single = simulate(300, 200, 8, concepts_per_item=(1, 1)).concepts.labels
    assert single.sum(1).tolist() == [1] * 200
    tiny = simulate(3, 2, 1)
    assert len(tiny.histories()) == 3


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"n_users": 0}, "n_users must be an int of at least 1"),
        ({"n_items": 5, "n_concepts": 9}, "every concept needs an item"),
        ({"concepts_per_item": (2, 1)}, "concepts_per_item"),
        ({"order": 1.5}, "order must be in"),
        ({"mean_length": 0}, "mean_length"),
        ({"popularity": -1}, "popularity"),
    ],
)
def test_bad_simulations(arguments, match):
    with pytest.raises(ValueError, match=match):
        simulate(**arguments)
