"""Steered serving against dense scores of all items; direction, profiles and calibration against their definitions."""

import math

import pytest
import torch
from torch import nn

from sae_kernels import TopKSAE, steer
from sae_kernels.data.histories import Histories
from sae_kernels.eval.ranking import rank_metrics, top_k
from sae_kernels.hooks import attach
from sae_kernels.nn import SparseCode
from sae_kernels.ops.activation_stats import ActivationStats
from sae_kernels.recommenders import ELSA, MultVAE, SASRec

N_ITEMS, N_USERS = 30, 24
MODELS = {
    "elsa": lambda: ELSA(N_ITEMS, 8),
    "multvae": lambda: MultVAE(N_ITEMS, 8),
    "sasrec": lambda: SASRec(N_ITEMS, 8),
}


def world(name="elsa", normalize="none"):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    sae = TopKSAE(8, 16, 4, normalize=normalize).eval()
    if normalize == "global":
        sae.fit_normalizer(torch.randn(50, 8))
    rows = [torch.randperm(N_ITEMS)[: int(torch.randint(4, 12, ()))].tolist() for _ in range(N_USERS)]
    histories = Histories.from_lists([row[3:] for row in rows], N_ITEMS)
    return model, sae, histories, Histories.from_lists([row[:3] for row in rows], N_ITEMS)


def attached_scores(model, sae, histories, edit, error_term, positions="all"):
    with attach(model, model.hook_point, sae, edit=edit, error_term=error_term, positions=positions), torch.no_grad():
        return model.score_histories(*histories.bags())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("normalize", ["none", "standardize", "global"])
@pytest.mark.parametrize("error_term", [False, True])
def test_ranks_as_the_attached_model_does(name, normalize, error_term):
    model, sae, histories, _ = world(name, normalize)
    ranker = steer.SteeredRanker(model, sae, error_term=error_term)
    users = ranker.encode(histories, batch_size=5)
    for edit in (None, steer.mix([3, 9], 0.4), steer.direction(torch.linspace(-1, 1, 8), 0.7)):
        scores = attached_scores(model, sae, histories, edit, error_term, "last" if name == "sasrec" else "all")
        scores[histories.row_ids(), histories.flat] = -torch.inf
        items, values = ranker.rank(users, 7, edit, batch_size=5)
        expected = scores.gather(1, top_k(scores, 7))
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores.gather(1, items), expected, rtol=1e-4, atol=1e-5)
    again = ranker.recommend(histories, 7, edit)
    assert torch.equal(again[0], items)


def test_error_term_without_an_edit_is_the_model():
    model, sae, histories, targets = world()
    base = rank_metrics(model, histories, targets, 5)["ndcg@5"]
    lists = {
        flag: steer.SteeredRanker(model, sae, error_term=flag).recommend(histories, 5)[0] for flag in (True, False)
    }
    dense = model.score_histories(*histories.bags()).detach()
    dense[histories.row_ids(), histories.flat] = -torch.inf
    assert torch.equal(lists[True], top_k(dense, 5)) and not torch.equal(lists[True], lists[False])
    assert base == rank_metrics(lambda rows: dense[rows], histories, targets, 5)["ndcg@5"]


def test_ties_short_catalogues_and_last_position():
    model, sae, _, _ = world()
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.zero_()
    histories = Histories.from_lists([[1, 1, 4], list(range(2, 30))], N_ITEMS)
    items, scores = steer.SteeredRanker(model, sae).recommend(histories, 4)
    assert items.tolist() == [[0, 2, 3, 5], [0, 1, -1, -1]]
    assert scores[1, 2:].tolist() == [-math.inf, -math.inf]


def test_embeddings_of_a_few_histories_are_those_of_many():
    model, _, histories, _ = world()
    many = model.encode_histories(*histories.bags())
    assert histories.flat.numel() > N_ITEMS > histories[3].numel()
    alone = model.encode_histories(*histories.bags(torch.tensor([3])))
    torch.testing.assert_close(alone[0], many[3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m, s, h: steer.SteeredRanker(nn.Linear(2, 2), s), TypeError, "must have encode_histories"),
        (lambda m, s, h: steer.SteeredRanker(_NoHead(), s), TypeError, "_NoHead has no item_head"),
        (
            lambda m, s, h: steer.SteeredRanker(m, TopKSAE(5, 9, 2)).encode(h),
            ValueError,
            "d_in = 5: not its bottleneck",
        ),
        (lambda m, s, h: steer.SteeredRanker(m, s).recommend(h, 31), ValueError, "n must be between 1 and 30, got 31"),
        (
            lambda m, s, h: steer.SteeredRanker(m, s).encode(Histories.from_lists([], 30)),
            ValueError,
            "there are no users",
        ),
        (
            lambda m, s, h: steer.SteeredRanker(m, s).encode(Histories.from_lists([[1], []], 30)),
            ValueError,
            "user row 1 has no history",
        ),
        (
            lambda m, s, h: steer.SteeredRanker(m, s).recommend(h, 3, steer.set_([1], math.inf)),
            ValueError,
            "scores of user row . are NaN",
        ),
    ],
)
def test_bad_serving(call, error, match):
    model, sae, histories, _ = world()
    if "NaN" in match:
        with torch.no_grad():
            sae.W_dec[1] = 0
    with pytest.raises(error, match=match):
        call(model, sae, histories)


class _NoHead(nn.Module):
    def encode_histories(self, flat, offsets):
        return flat


@pytest.mark.parametrize("normalize", ["none", "standardize", "global"])
def test_direction_moves_the_reconstruction(normalize):
    torch.manual_seed(0)
    sae, x, vector = TopKSAE(6, 12, 3, normalize=normalize), torch.randn(5, 6), torch.randn(6)
    if normalize == "global":
        sae.fit_normalizer(torch.randn(50, 6))
    code = sae.encode(x)
    edited = steer.direction(vector, 0.5)(code)
    step = 0.5 * vector * (1 if code.scale is None else code.scale)
    torch.testing.assert_close(sae.decode(edited), sae.decode(code) + step)
    torch.testing.assert_close(sae.decode_difference(edited, code), step.expand(5, 6), rtol=1e-5, atol=1e-6)
    assert edited.values is code.values and edited.indices is code.indices


def stats_of(dense):
    stats = ActivationStats(dense.shape[1])
    stats.update(dense, torch.arange(dense.shape[1]).expand_as(dense))
    return stats


def test_cohens_d():
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(20, 6, generator=g).double(), torch.rand(30, 6, generator=g).double() * 2
    a[:, 3], b[:, 3], a[:, 4], b[:, 4] = 0, 0, 1.1, 0.1
    got = steer.cohens_d(stats_of(a), stats_of(b))
    pooled = ((19 * a.var(0) + 29 * b.var(0)) / 48).sqrt()
    expected = (a.mean(0) - b.mean(0)) / pooled
    torch.testing.assert_close(got[[0, 1, 2, 5]], expected[[0, 1, 2, 5]], rtol=1e-10, atol=0)
    assert got[3] == 0 and got[4] == math.inf
    same = torch.linspace(0.1, 2, 50).double()  # constants whose means round differently over 3 rows and over 7
    assert (steer.cohens_d(stats_of(same.repeat(3, 1)), stats_of(same.repeat(7, 1))) == 0).all()
    with pytest.raises(ValueError, match="first has 1 rows, expected at least 2"):
        steer.cohens_d(stats_of(a[:1]), stats_of(b))
    with pytest.raises(ValueError, match="d_sae of the two differ: 5 and 6"):
        steer.cohens_d(stats_of(a[:, :5]), stats_of(b))


def test_popularity_latents_find_the_mainstream():
    """Item 0 to 4 are everybody's; latent 2 fires on who has only these, latent 5 on who has the others."""
    rows = [[i % 5, (i + 1) % 5] for i in range(40)] + [[5 + i, 15 + i] for i in range(10)]
    histories = Histories.from_lists(rows, 30)
    popularity = steer.user_popularity(histories)
    assert popularity[0] == pytest.approx(math.log(17)) and popularity[-1] == pytest.approx(math.log(2))
    repeats = steer.user_popularity(Histories.from_lists([[0, 0, 0], [1], [1]], 2))
    assert repeats.exp().tolist() == pytest.approx([2, 3, 3])
    indices = torch.tensor([[2]] * 40 + [[5]] * 10)
    values = torch.rand(50, 1, generator=torch.Generator().manual_seed(1)) + 1
    d = steer.popularity_latents(SparseCode(values, indices, 8), histories)
    assert d.argmax() == 2 and d.argmin() == 5 and d[2] > 2 and (d[[0, 1, 3, 4, 6, 7]] == 0).all()
    wide = steer.popularity_latents(SparseCode(values, indices, 8), histories, 0.5)
    assert wide[2] < d[2]  # half of the users hold some of the others
    with pytest.raises(ValueError, match=r"share must be in \(0, 0.5\], got 0.6"):
        steer.popularity_latents(SparseCode(values, indices, 8), histories, 0.6)
    with pytest.raises(ValueError, match="code has 49 rows and histories 50 users"):
        steer.popularity_latents(SparseCode(values[1:], indices[1:], 8), histories)
    few = histories.select(torch.arange(9))
    with pytest.raises(ValueError, match="popularity_latents: a share of 0.2 of 9 users is 1; either side needs 2"):
        steer.popularity_latents(SparseCode(values[:9], indices[:9], 8), few)


def test_group_code():
    values = torch.tensor([[1.0, 2, 3], [4.0, 0, 1], [2.0, 2, 5]])
    indices = torch.tensor([[0, 1, 1], [0, 3, 4], [0, 4, 6]], dtype=torch.int32)
    code = SparseCode(values, indices, 8, torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([[1.0], [1.0], [4.0]]))
    dense = code.to_dense()
    assert steer.group_code(code).to_dense()[0].tolist() == pytest.approx(dense.mean(0).tolist())
    assert torch.equal(steer.group_code(code, "max").to_dense()[0], dense.amax(0))
    assert steer.group_code(code, "common").to_dense()[0].tolist() == pytest.approx([7 / 3, 0, 0, 0, 0, 0, 0, 0])
    some = steer.group_code(code, "common", at_least=2 / 3)
    assert some.to_dense()[0].tolist() == pytest.approx([7 / 3, 0, 0, 0, 1, 0, 0, 0])
    assert some.offset.item() == 3 and some.scale.item() == 2 and some.indices.dtype == torch.int32
    signed = SparseCode(torch.tensor([[-1.0, -2], [-3.0, 2]]), torch.tensor([[0, 1], [1, 2]]), 4)
    assert torch.equal(steer.group_code(signed, "max").to_dense()[0], signed.to_dense().amax(0))
    one = SparseCode(values[:1], indices[:1], 8)
    for how in ("average", "max", "common"):
        assert torch.equal(steer.group_code(one, how).to_dense(), one.to_dense())
    with pytest.raises(ValueError, match="how must be 'average', 'max' or 'common', got 'sum'"):
        steer.group_code(code, "sum")
    with pytest.raises(ValueError, match="at_least must be in"):
        steer.group_code(code, "common", at_least=0)
    with pytest.raises(ValueError, match="the group has no member"):
        steer.group_code(SparseCode(values[:0], indices[:0], 8))


def test_dhondt():
    # 100 votes: 53, 24, 23 and seven seats, a textbook's allocation by highest averages
    got = steer.dhondt(torch.tensor([[53.0, 24, 23], [0, 1, 1]]), 7)
    assert torch.bincount(got[0]).tolist() == [4, 2, 1] and got[0].tolist() == [0, 0, 1, 2, 0, 0, 1]
    assert got[1].tolist() == [1, 2, 1, 2, 1, 2, 1]
    assert steer.dhondt(torch.ones(2, 3), 0).shape == (2, 0)
    # the same shares as counts and as parts of one; .3 / 3 and .1 differ by rounding
    counts = torch.tensor([[3.0, 1, 6], [1, 3, 9], [7, 14, 49]])
    for dtype in (torch.float32, torch.float64):
        votes = counts.to(dtype)
        assert torch.equal(steer.dhondt(votes / votes.sum(1, keepdim=True), 40), steer.dhondt(votes, 40))
    with pytest.raises(ValueError, match="with a positive one in every row"):
        steer.dhondt(torch.zeros(1, 3), 2)


def kinds():
    """Items of three kinds along three axes; latent c is axis c: steering by it lists its kind."""
    model = ELSA(30, 8).eval()
    sae = TopKSAE(8, 8, 4).eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        kind = torch.arange(30) % 3
        model.encoder.weight.copy_(torch.eye(8)[kind] + 0.3 * torch.randn(30, 8, generator=g))
        sae.W_dec.copy_(torch.eye(8))
        sae.W_enc.copy_(torch.eye(8))
    # two of each kind are seen, so that eight of each are left
    seen = [[3 * i + c for c in range(3) for i in torch.randperm(10, generator=g)[:2].tolist()] for _ in range(20)]
    histories = Histories.from_lists(seen, 30)
    return model, sae, histories, kind.unsqueeze(1) == torch.arange(3)


def test_calibration_brings_the_lists_to_the_shares():
    model, sae, histories, labels = kinds()
    ranker = steer.SteeredRanker(model, sae)
    users = ranker.encode(histories)
    shares = torch.tensor([[0.6, 0.3, 0.1]]).double().repeat(20, 1)
    shares[4] = 0
    plain = ranker.rank(users, 10)[0]
    got = steer.calibrated(ranker, users, [[0], [1], [2]], shares, 10, alpha=0.95)
    told = torch.arange(20) != 4
    # six, three and one of the ten places by D'Hondt, of items that have one concept each
    assert labels[got[told]].sum(1).tolist() == [[6, 3, 1]] * 19
    assert labels[plain[told]].sum(1).tolist() != [[6, 3, 1]] * 19
    assert torch.equal(got[4], plain[4])
    for user in range(20):
        assert len(set(got[user].tolist())) == 10 and not set(got[user].tolist()) & set(histories[user].tolist())
    one = steer.calibrated(ranker, users, [[0], [1], [2]], shares, 10, alpha=0.95, top=1)
    assert torch.equal(one[told], ranker.rank(users, 10, steer.mix([0], 0.95))[0][told])
    assert torch.equal(steer.calibrated(ranker, users, [[0]], shares[:, :1] * 0, 10), plain)
    first_of_equal = steer.calibrated(ranker, users, [[2], [0], [1]], torch.ones(20, 3), 10, alpha=0.95, top=1)
    assert torch.equal(first_of_equal, ranker.rank(users, 10, steer.mix([2], 0.95))[0])
    with pytest.raises(ValueError, match="calibrated: concept 1 has no latents, and users have a share of it"):
        steer.calibrated(ranker, users, [[0], [], [2]], shares, 10)
    unasked = steer.calibrated(ranker, users, [[0], [], [2]], shares * torch.tensor([1, 0, 1]), 10)
    assert unasked.shape == (20, 10)
    with pytest.raises(ValueError, match="top must be between 1 and"):
        steer.calibrated(ranker, users, [[0], [1], [2]], shares, 10, top=0)
    with pytest.raises(ValueError, match=r"shares must be \[20 users, 2 concepts\], got \(20, 3\)"):
        steer.calibrated(ranker, users, [[0], [1]], shares, 10)


def test_concept_shares():
    labels = torch.tensor([[True, False], [True, True], [False, False]])
    got = steer.concept_shares(Histories.from_lists([[0, 1], [2], [1]], 3), labels)
    assert got.tolist() == [[pytest.approx(2 / 3), pytest.approx(1 / 3)], [0, 0], [0.5, 0.5]]
    with pytest.raises(ValueError, match=r"labels must be bool \[n_items = 4, n_concepts\]"):
        steer.concept_shares(Histories.from_lists([[0]], 4), labels)
