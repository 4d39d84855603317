"""Concept scores from sparse codes against a dense fp64 oracle that compares every pair of rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sae_kernels import interpret
from sae_kernels.nn.code import SparseCode
from sae_kernels.ops.activation_stats import ActivationStats
from sae_kernels.recommenders.elsa import ELSA

D = 11


def case(rows, k=3, concepts=4, seed=0, signed=False, dtype=torch.float32):
    """Codes with many ties and zeros, and labels of several frequencies."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(-3 if signed else 0, 4, (rows, k), generator=g).to(dtype) / 4
    indices = torch.rand(rows, D, generator=g).argsort(1)[:, :k].to(torch.int32)
    labels = torch.rand(rows, concepts, generator=g) < torch.linspace(0.1, 0.7, concepts)
    return values, indices, labels


def dense(values, indices):
    return torch.zeros(len(values), D, dtype=torch.float64).scatter_add_(1, indices.long(), values.double())


def pair_auc(z, label):
    """Every positive row against every negative one; [D]."""
    a, b = z[label].unsqueeze(1), z[~label].unsqueeze(0)
    return ((a > b).double() + (a == b).double() / 2).mean((0, 1))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_against_dense_oracle(signed, dtype):
    values, indices, labels = case(120, signed=signed, dtype=dtype)
    got, z = interpret.concept_scores(values, indices, D, labels), dense(values, indices)
    on = z != 0
    for c in range(4):
        y = labels[:, c]
        torch.testing.assert_close(got.auc[c], pair_auc(z, y), rtol=0, atol=1e-14)
        tp = (on & y[:, None]).sum(0).double()
        assert torch.equal(got.together[c].double(), tp)
        torch.testing.assert_close(got.precision[c], tp / on.sum(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(got.recall[c], tp / y.sum(), rtol=1e-14, atol=0)
        torch.testing.assert_close(got.f1[c], 2 * tp / (y.sum() + on.sum(0)), rtol=1e-14, atol=0)
        torch.testing.assert_close(got.lift[c], tp / on.sum(0) / y.double().mean(), rtol=1e-14, atol=0)
        pearson = torch.corrcoef(torch.cat([z.T, y.double()[None]]))[-1, :-1]
        torch.testing.assert_close(got.correlation[c], pearson, rtol=0, atol=1e-12)
    assert torch.equal(got.support, labels.sum(0)) and torch.equal(got.firings, on.sum(0)) and got.rows == 120


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(0, D), st.booleans(), st.integers(0, 9999))
def test_auc_property(rows, k, signed, seed):
    values, indices, labels = case(rows, k, seed=seed, signed=signed)
    auc, z = interpret.concept_auc(values, indices, D, labels), dense(values, indices)
    for c in range(4):
        y = labels[:, c]
        if y.all() or not y.any():
            assert auc[c].isnan().all()
        else:
            torch.testing.assert_close(auc[c], pair_auc(z, y), rtol=0, atol=1e-14)


def test_hand_numbers():
    values = torch.tensor([[2.0, 1.0], [1.0, 0.0], [1.0, 3.0], [0.0, 0.0]])
    indices = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 1]])
    labels = torch.tensor([[True], [False], [True], [False]])
    got = interpret.concept_scores(values, indices, 4, labels)
    # latent 0: 2 beats 1 and 0, 1 ties with 1 and beats 0; latent 3 never fires
    assert got.auc[0].tolist() == [3.5 / 4, 0.75, 0.75, 0.5]
    assert got.precision[0].tolist() == [2 / 3, 1, 1, 0] and got.recall[0].tolist() == [1, 0.5, 0.5, 0]
    assert got.correlation[0, 3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_latent_of_one_value_correlates_with_nothing(dtype):
    """In float64 its mean rounds: what that leaves is no spread. One that is silent once, or varies a little, does."""
    y = (torch.arange(13) % 3 == 0).unsqueeze(1)
    values = torch.full((13, 2), 0.3, dtype=dtype)
    values[5, 1] = 0
    got = interpret.concept_scores(values, torch.tensor([0, 1]).expand(13, 2), 3, y).correlation[0]
    assert got[0] == got[2] == 0 and got[1] == pytest.approx(
        float(torch.corrcoef(torch.stack([values[:, 1], y[:, 0]]))[0, 1]), abs=1e-6
    )
    nearly = 1 + 1e-9 * torch.arange(13, dtype=torch.float64).unsqueeze(1)
    got = interpret.concept_scores(nearly, torch.zeros(13, 1, dtype=torch.int64), 1, y).correlation
    assert float(got) == pytest.approx(
        float(torch.corrcoef(torch.stack([torch.arange(13.0), y[:, 0]]))[0, 1]), abs=1e-5
    )


def test_empty_and_one_sided_concepts():
    values, indices, labels = case(30)
    labels[:, 0], labels[:, 1] = False, True
    got = interpret.concept_scores(values, indices, D, labels)
    assert got.auc[:2].isnan().all() and got.correlation[:2].isnan().all() and not got.auc[2:].isnan().any()
    assert (got.recall[0] == 0).all() and (got.precision[1][got.firings > 0] == 1).all()
    none = interpret.concept_scores(values[:0], indices[:0], D, labels[:0])
    assert none.auc.isnan().all() and (none.firings == 0).all()


def planted():
    """Concept c of 4 fires latent 2c + 1 on nine in ten of its rows; latent 0 fires everywhere, others at random."""
    g = torch.Generator().manual_seed(5)
    concept = torch.randint(0, 5, (400,), generator=g)
    labels = torch.stack([concept == c for c in range(4)], 1)
    hit = (torch.rand(400, generator=g) < 0.9) & (concept < 4)
    first = torch.where(hit, 2 * concept + 1, 9)
    values = torch.stack([1 + torch.rand(400, generator=g), torch.rand(400, generator=g)], 1)
    return values, torch.stack([first, torch.where(first == 9, 10, 0)], 1), labels


@pytest.mark.parametrize("by", ["auc", "f1", "precision", "recall", "correlation", "lift"])
def test_best_latents_find_planted_concepts(by):
    values, indices, labels = planted()
    scores = interpret.concept_scores(values, indices, D, labels)
    best = interpret.best_latents(scores, "abcd", by=by, min_support=20)
    assert [b.concept for b in best] == list("abcd")
    # latent 0 fires on all planted rows, so that it has no smaller recall than they
    assert [b.latent for b in best] == ([0] * 4 if by == "recall" else [1, 3, 5, 7])
    for c, b in enumerate(best):
        for name in ("auc", "precision", "recall", "f1", "correlation", "lift", "together"):
            assert getattr(b, name) == getattr(scores, name)[c, b.latent]
        assert b.support == labels[:, c].sum() and b.firings == scores.firings[b.latent]


def test_min_support_leaves_out_what_fires_too_rarely():
    scores = interpret.concept_scores(*planted()[:2], D, planted()[2])
    most = scores.together.amax(1)
    kept = interpret.best_latents(scores, "abcd", min_support=int(most.max()))
    assert [b.concept for b in kept] == ["abcd"[c] for c in range(4) if most[c] == most.max()] and len(kept) < 4
    with pytest.raises(ValueError, match="by must be auc"):
        interpret.best_latents(scores, "abcd", by="chance")
    with pytest.raises(ValueError, match="names must have one entry per concept, 4, got 3"):
        interpret.best_latents(scores, "abc")
    with pytest.raises(ValueError, match="min_support must be between 1"):
        interpret.best_latents(scores, "abcd", min_support=0)


def test_name_latents():
    scores = interpret.concept_scores(*planted()[:2], D, planted()[2])
    named = interpret.name_latents(scores, "abcd")
    assert {f: n.concept for f, n in named.items()} == {1: "a", 3: "b", 5: "c", 7: "d"}
    assert all(n.auc >= 0.6 and n.lift >= 2 and n.latent == f for f, n in named.items())
    assert interpret.name_latents(scores, "abcd", min_auc=0.999) == {}
    assert interpret.name_latents(scores, "abcd", min_lift=50) == {}
    assert interpret.name_latents(scores, "abcd", min_support=399) == {}
    assert 0 in interpret.name_latents(scores, "abcd", min_auc=0.5, min_lift=0)


@pytest.mark.parametrize("orientation", ["characterises", "unique"])
@pytest.mark.parametrize("weighted", [False, True])
def test_tfidf_against_dense(orientation, weighted):
    values, indices, labels = case(50, seed=2)
    if weighted:
        labels = labels * torch.arange(50).unsqueeze(1)
    got = interpret.concept_tfidf(values, indices, D, labels, orientation)
    share = labels.double() / labels.double().sum(0)
    mass = share.T @ dense(values, indices)
    if orientation == "characterises":
        expected = mass / mass.sum(1, keepdim=True) * (((1 + 4) / (1 + (mass > 0).sum(0))).log() + 1)
    else:
        expected = mass / mass.sum(0) * (((1 + D) / (1 + (mass > 0).sum(1, keepdim=True))).log() + 1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_tfidf_of_silent_concepts_and_errors():
    values, indices, labels = case(20)
    labels[:, 1] = False
    assert (interpret.concept_tfidf(values, indices, D, labels)[1] == 0).all()
    with pytest.raises(ValueError, match="orientation must be"):
        interpret.concept_tfidf(values, indices, D, labels, "best")
    with pytest.raises(ValueError, match="finite and not negative"):
        interpret.concept_tfidf(values, indices, D, -labels.float())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"labels": torch.zeros(20, 2)}, TypeError, "labels must be bool, got torch.float32"),
        ({"labels": torch.zeros(19, 2, dtype=torch.bool)}, ValueError, r"one row per code, 20, got \(19, 2\)"),
        ({"indices": torch.full((20, 3), D)}, ValueError, "indices must be in"),
        ({"indices": torch.zeros(20, 2, dtype=torch.int64)}, ValueError, r"values \(20, 3\) and indices \(20, 2\)"),
        ({"indices": torch.zeros(20, 3)}, TypeError, "indices must be int32 or int64"),
        ({"indices": torch.full((20, 3), 7)}, ValueError, "indices of row 0 name latent 7 twice"),
        ({"values": torch.full((20, 3), torch.nan)}, ValueError, "values of row 0 hold NaN or Inf"),
        ({"values": torch.ones(20, 3, dtype=torch.int64)}, TypeError, "values must be float32"),
        ({"d_sae": 0}, ValueError, "d_sae must be between 1"),
    ],
)
def test_bad_input(change, error, match):
    _, indices, labels = case(20)
    with pytest.raises(error, match=match):
        good = {"values": torch.ones(20, 3), "indices": indices, "d_sae": D, "labels": labels}
        interpret.concept_scores(**{**good, **change})


class Doubling(nn.Module):
    """A stand-in SAE whose code of x is x itself, at places that depend on the sign; it remembers its mode."""

    def encode(self, x):
        self.seen = self.training
        return SparseCode(x.abs(), torch.arange(x.shape[1]).expand_as(x) + 4 * (x < 0), 8)


def test_item_codes_are_those_of_one_item_histories():
    torch.manual_seed(0)
    model, sae = ELSA(10, 4), Doubling()
    code = interpret.item_codes(model, sae, batch_size=3)
    expected = sae.encode(model.encoder(torch.eye(10)).detach())
    torch.testing.assert_close(code.values, expected.values)
    assert torch.equal(code.indices, expected.indices) and code.d_sae == 8 and not code.values.requires_grad
    interpret.item_codes(model, sae)
    assert sae.seen is False and model.training and sae.training
    with pytest.raises(TypeError, match="Linear has not"):
        interpret.item_codes(nn.Linear(2, 2), sae)


def test_latent_examples():
    stats = ActivationStats(4, top=2)
    stats.update(torch.tensor([[1.0], [3.0], [2.0], [5.0]]), torch.tensor([[0], [0], [0], [2]]))
    found = interpret.latent_examples(stats, "wxyz")
    assert found == {
        0: [interpret.Example(1, "x", 3.0), interpret.Example(2, "y", 2.0)],
        2: [interpret.Example(3, "z", 5.0)],
    }
    assert interpret.latent_examples(stats, "wxyz", [1, 2]) == {1: [], 2: found[2]}
    with pytest.raises(ValueError, match="id 3 of latent 2 has no title among the 3"):
        interpret.latent_examples(stats, "wxy")
    with pytest.raises(ValueError, match=r"latents must be in \[0, d_sae = 4\), got 4"):
        interpret.latent_examples(stats, "wxyz", [4])
    with pytest.raises(ValueError, match="top=n"):
        interpret.latent_examples(ActivationStats(4), "wxyz")
