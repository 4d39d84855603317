"""Edits against their dense definitions; the steering table against one computed from dense scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_kernels import steer
from sae_kernels.data.histories import Histories
from sae_kernels.eval.ranking import rank_metrics
from sae_kernels.nn import SparseCode, TopKSAE
from sae_kernels.recommenders.elsa import ELSA

D = 13
LATENTS = [4, 0, 11]


def code_of(shape=(6,), k=4, dtype=torch.float64, seed=0, repeats=True):
    """Codes with zeros, and with latents that stand in two slots of a row."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 5, (*shape, k), generator=g).to(dtype) / 4
    indices = torch.rand(*shape, D, generator=g).argsort(-1)[..., :k].to(torch.int32)
    if repeats and k > 1:
        indices[..., 1] = indices[..., 0]
    return SparseCode(values, indices, D, torch.ones(*shape, 1), torch.full((*shape, 1), 2.0))


def onto(z, f):
    """Dense z [..., D] with f applied to the chosen latents."""
    out = z.clone()
    out[..., LATENTS] = f(z[..., LATENTS])
    return out


AMOUNTS = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
CASES = {
    "mix": (
        steer.mix(LATENTS, 0.3),
        lambda z: 0.7 * z + onto(torch.zeros_like(z), lambda c: c + 0.1 * z.sum(-1, keepdim=True)),
    ),
    "mix one": (steer.mix(7, 1.0), lambda z: z.sum(-1, keepdim=True) * (torch.arange(D) == 7)),
    "mix all": (
        steer.mix_all([([4, 0], 0.2), (torch.tensor([11, 0]), 0.5)]),
        lambda z: (
            0.3 * z
            + z.sum(-1, keepdim=True) * torch.tensor([0.35, 0, 0, 0, 0.1, 0, 0, 0, 0, 0, 0, 0.25, 0], dtype=z.dtype)
        ),
    ),
    "mix weighted": (
        steer.mix(LATENTS, 0.5, [2.0, 0.0, 6.0]),
        lambda z: (
            0.5 * z
            + z.sum(-1, keepdim=True) * torch.tensor([0, 0, 0, 0, 0.125, 0, 0, 0, 0, 0, 0, 0.375, 0], dtype=z.dtype)
        ),
    ),
    "mix nothing": (steer.mix(LATENTS, 0.0), lambda z: z),
    "set": (steer.set_(LATENTS, 1.5), lambda z: onto(z, lambda c: torch.full_like(c, 1.5))),
    "set each": (steer.set_(torch.tensor(LATENTS), AMOUNTS), lambda z: onto(z, lambda c: AMOUNTS.expand_as(c))),
    "add": (steer.add(LATENTS, -0.25), lambda z: onto(z, lambda c: c - 0.25)),
    "add each": (steer.add(LATENTS, AMOUNTS), lambda z: onto(z, lambda c: c + AMOUNTS)),
    "scale": (steer.scale(LATENTS, 3.0), lambda z: onto(z, lambda c: 3 * c)),
    "suppress": (steer.suppress(LATENTS), lambda z: onto(z, torch.zeros_like)),
    "clamp": (steer.clamp(LATENTS, 0.5, 1.0), lambda z: onto(z, lambda c: c.clamp(0.5, 1.0))),
    "clamp high": (steer.clamp(LATENTS, high=0.5), lambda z: onto(z, lambda c: c.clamp(max=0.5))),
    "chain": (
        steer.chain(steer.add(LATENTS, 1.0), steer.scale(LATENTS, 2.0), steer.clamp(LATENTS, high=3.0)),
        lambda z: onto(z, lambda c: (2 * (c + 1)).clamp(max=3.0)),
    ),
    "chain of none": (steer.chain(), lambda z: z),
    "no latents": (steer.set_([], 1.0), lambda z: z),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(6,), (2, 3), (), (0,)])
def test_edits_against_their_dense_definition(name, shape):
    edit, dense = CASES[name]
    code = code_of(shape)
    before = code.values.clone(), code.indices.clone()
    edited = edit(code)
    torch.testing.assert_close(edited.to_dense(), dense(code.to_dense()), rtol=1e-14, atol=1e-14)
    assert edited.indices.dtype == torch.int32 and edited.d_sae == D
    assert edited.offset is code.offset and edited.scale is code.scale
    assert torch.equal(code.values, before[0]) and torch.equal(code.indices, before[1])


@pytest.mark.parametrize("weights", [None, [2.0, 0.0, 1.0]])
def test_mix_near_gives_each_row_its_own_shares(weights):
    code = code_of((7,))
    code = code.replace(values=torch.where(torch.arange(7)[:, None] == 3, 0, code.values))  # a row that fires nowhere
    W = torch.randn(D, 5, generator=torch.Generator().manual_seed(1)).double()
    W[LATENTS] = torch.where(torch.arange(3)[:, None] == 2, W[LATENTS].abs(), W[LATENTS])
    W[:, 0] += 1.0
    z, worth = code.to_dense(), torch.tensor(weights or [1.0, 1, 1], dtype=torch.float64)
    got = steer.mix_near(LATENTS, 0.4, W, weights)(code).to_dense()
    for row in range(7):
        near = (W[LATENTS] @ (z[row] @ W)).relu() * worth
        share = near / near.sum() if near.sum() > 0 else worth / worth.sum()
        expected = onto(0.6 * z[row], lambda c, row=row, share=share: c + 0.4 * z[row].sum() * share)
        torch.testing.assert_close(got[row], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.sum(1), z.sum(1), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(got, steer.mix(LATENTS, 0.4, weights)(code).to_dense())
    alone = code.replace(values=torch.ones(7, 1).double(), indices=torch.full((7, 1), LATENTS[0], dtype=torch.int32))
    away = torch.zeros(D, 5).double()  # near to nothing: the weights alone
    torch.testing.assert_close(
        steer.mix_near(LATENTS, 0.4, away, weights)(alone).to_dense(),
        steer.mix(LATENTS, 0.4, weights)(alone).to_dense(),
    )


def test_favourites_are_the_softmax_mean_of_the_items():
    g = torch.Generator().manual_seed(0)
    h, items = torch.randn(2, 3, 4, generator=g).double(), torch.randn(6, 4, generator=g).double()
    got = steer.favourites(h, items, 1.5)
    for row, mine in zip(h.reshape(-1, 4), got.reshape(-1, 4), strict=True):
        scores = items @ row
        weight = (1.5 * (scores - scores.mean()) / scores.std(correction=0)).exp()
        torch.testing.assert_close(mine, weight @ items / weight.sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(steer.favourites(h, items, 0), items.mean(0).expand_as(h))
    torch.testing.assert_close(steer.favourites(h, items, 1e4), items[(h @ items.T).argmax(-1)])
    # longer histories are not surer: the scale of h is no sharpness
    torch.testing.assert_close(steer.favourites(9 * h, items), steer.favourites(h, items))
    assert (steer.favourites(h, items[:0]) == 0).all()
    assert torch.equal(steer.favourites(0 * h, items[:1]), 0 * h + items[0])
    with pytest.raises(ValueError, match="sharpness must be finite and not negative, got -1"):
        steer.favourites(h, items, -1)


def test_mix_liked_is_mix_near_the_favourites():
    g = torch.Generator().manual_seed(0)
    sae = TopKSAE(5, D, 4, normalize="standardize", generator=g).double().eval()
    code, items = sae.encode(torch.randn(7, 5, generator=g).double()), torch.randn(8, 5, generator=g).double()
    z, worth, W = code.to_dense(), torch.tensor([2.0, 0.5, 1.0]).double(), sae.W_dec
    with torch.no_grad():
        got = steer.mix_liked(LATENTS, 0.4, sae, items, worth, sharpness=3.0)(code).to_dense()
        near = (steer.favourites(sae.decode(code), items, 3.0) @ W[LATENTS].T).relu() * worth
        for row in range(7):
            share = near[row] / near[row].sum() if near[row].sum() > 0 else worth / worth.sum()
            expected = onto(0.6 * z[row], lambda c, row=row, share=share: c + 0.4 * z[row].sum() * share)
            torch.testing.assert_close(got[row], expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(got, steer.mix_liked(LATENTS, 0.4, sae, items, worth)(code).to_dense())
        none = steer.mix_liked(LATENTS, 0.4, sae, items[:0], worth)(code).to_dense()
        torch.testing.assert_close(none, steer.mix(LATENTS, 0.4, worth)(code).to_dense())
    with pytest.raises(ValueError, match=r"items must be \[n, d_in = 5\], got \(8, 4\)"):
        steer.mix_liked(LATENTS, 0.4, sae, items[:, 1:])


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0, 1), st.integers(1, 8), st.lists(st.integers(0, D - 1), min_size=1, unique=True), st.integers(0, 999)
)
def test_mix_keeps_the_mass(alpha, k, latents, seed):
    code = code_of(k=k, seed=seed)
    edited = steer.mix(latents, alpha)(code)
    mass = code.values.sum(-1)
    torch.testing.assert_close(edited.values.sum(-1), mass, rtol=1e-13, atol=0)
    least = alpha / len(latents) * mass * (1 - 1e-12) - 1e-300  # of an alpha that is subnormal
    assert (edited.to_dense()[:, latents] >= least.unsqueeze(1)).all()
    assert edited.values.shape[-1] == k + len(latents)


@pytest.mark.parametrize("activation", ["relu", "none", "abs"])
def test_mixes_are_towards_the_latents_whatever_the_sign_of_the_code(activation):
    g = torch.Generator().manual_seed(0)
    sae = TopKSAE(8, D, 4, activation=activation, generator=g).double().eval()
    code = sae.encode(torch.randn(60, 8, generator=g, dtype=torch.float64))
    code = code.replace(values=code.values.detach())
    # a slot that takes something back leaves less of its latent to mix
    back = code.replace(
        values=torch.cat([code.values, -0.5 * code.values[:, :1]], 1),
        indices=torch.cat([code.indices, code.indices[:, :1]], 1),
    )
    for one in (code, back):
        mass = one.to_dense().abs().sum(-1)
        for edit in (steer.mix(LATENTS, 0.6, [1.0, 2.0, 1.0]), steer.mix_near(LATENTS, 0.6, sae.W_dec.detach())):
            added = edit(one).values[:, -len(LATENTS) :]
            assert (added >= 0).all()
            torch.testing.assert_close(added.sum(-1), 0.6 * mass)
    assert (code.values.sum(-1) < 0).any() == (activation == "abs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_stays_and_gradients_flow(dtype):
    code = code_of(dtype=dtype)
    leaf = code.values.clone().requires_grad_()
    edited = steer.chain(steer.mix([2], 0.25), steer.add([3], 1), steer.scale([4], 0.5))(code.replace(values=leaf))
    assert edited.values.dtype == dtype
    edited.values.sum().backward()
    # mix passes (1 - alpha) to the slot and alpha to its latent; scale halves what stands on latent 4
    slot = torch.where(code.indices == 4, 0.375, 0.75) + 0.25
    torch.testing.assert_close(leaf.grad, slot.to(dtype))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: steer.mix([1], 1.5), ValueError, "alpha must be between 0 and 1, got 1.5"),
        (lambda: steer.mix([], 0.5), ValueError, "mix: latents must name at least one latent"),
        (lambda: steer.mix([1, 2], 0.5, [1.0]), ValueError, r"weights must be one per latent, \(2,\), got \(1,\)"),
        (lambda: steer.mix([1, 2], 0.5, [0.0, 0.0]), ValueError, "weights must be finite, not negative, and not all 0"),
        (lambda: steer.mix([1, 2], 1.5, [1.0, 0.0]), ValueError, "alpha must be between 0 and 1, got 1.5"),
        (lambda: steer.mix_near([1], 1.5, torch.ones(D, 2)), ValueError, "alpha must be between 0 and 1, got 1.5"),
        (lambda: steer.mix_near([1], 0.5, torch.ones(D)), ValueError, r"W_dec must be \[d_sae, d\], got \(13,\)"),
        (
            lambda: steer.mix_near([1], 0.5, torch.ones(9, 2))(code_of()),
            ValueError,
            r"W_dec \(9, 2\) must have d_sae = 13",
        ),
        (lambda: steer.mix_near([D], 0.5, torch.ones(D, 2).double())(code_of()), ValueError, "latents must be in"),
        (lambda: steer.mix_all([(1, 0.6), (2, 0.5)]), ValueError, "the alphas must sum to at most 1, got 1.1"),
        (lambda: steer.mix_all([]), ValueError, "latents must name at least one latent"),
        (lambda: steer.direction([1.0], 1.0), TypeError, r"vector must be a floating tensor \[d_in\], got list"),
        (lambda: steer.direction(torch.ones(2), math.nan), ValueError, "vector and amount must be finite"),
        (lambda: steer.set_([1, 1], 0.5), ValueError, "set_: latents must be distinct"),
        (lambda: steer.add([-1], 0.5), ValueError, "add: latents must be distinct and not negative"),
        (lambda: steer.suppress([0.5]), TypeError, "suppress: latents must be integers, got torch.float32"),
        (lambda: steer.suppress(torch.tensor([True])), TypeError, "latents must be integers, got torch.bool"),
        (lambda: steer.add([1, 2], torch.ones(3)), ValueError, r"amount must be one number or one per latent, \(2,\)"),
        (lambda: steer.set_([1], float("nan")), ValueError, "set_: value must not be NaN"),
        (lambda: steer.scale([1], float("nan")), ValueError, "scale: factor must not be NaN"),
        (lambda: steer.clamp([1]), ValueError, "clamp: low, high or both"),
        (lambda: steer.clamp([1], 2.0, 1.0), ValueError, "low must not be above high, got 2.0 and 1.0"),
        (lambda: steer.mix([D], 0.5)(code_of()), ValueError, rf"latents must be in \[0, d_sae = {D}\), got {D}"),
        (lambda: steer.suppress([D])(code_of()), ValueError, "latents must be in"),
        (lambda: steer.clamp([D], 0, 1)(code_of()), ValueError, "latents must be in"),
    ],
)
def test_bad_edits(make, error, match):
    with pytest.raises(error, match=match):
        make()


N_ITEMS, N_USERS = 30, 24


def world():
    torch.manual_seed(0)
    model, sae = ELSA(N_ITEMS, 8), TopKSAE(8, 16, 4)
    rows = [torch.randperm(N_ITEMS)[:8].tolist() for _ in range(N_USERS)]
    histories = Histories.from_lists([row[:5] for row in rows], N_ITEMS)
    return model, sae, histories, Histories.from_lists([row[5:] for row in rows], N_ITEMS)


def dense_scores(model, sae, histories, edit):
    x = histories.batch()
    with torch.no_grad():
        return model.decoder(sae.decode(edit(sae.encode(model.encoder(x))))) - x


@pytest.mark.parametrize("as_codes", [False, True])
def test_table_against_dense_scores(as_codes):
    model, sae, histories, targets = world()
    items = torch.tensor([3, 8, 9, 21])
    member = torch.zeros(N_ITEMS, dtype=torch.bool).index_fill_(0, items, True)
    before = model.score_histories(*histories.bags())

    def edit_at(alpha):
        return steer.mix([5, 2], alpha)

    table = steer.steering_table(
        steer.attached(model, sae), edit_at, items if as_codes else member, histories, targets, k=6, batch_size=7
    )
    assert [row.strength for row in table] == [0.0, 0.1, 0.2, 0.3, 0.5] and {row.k for row in table} == {6}
    seen = histories.batch(None, torch.bool)
    for row in table:
        scores = dense_scores(model, sae, histories, edit_at(row.strength))
        top = scores.masked_fill(seen, -torch.inf).topk(6).indices
        assert row.concept_share == pytest.approx(member[top].double().mean().item(), rel=1e-6)
        personal = rank_metrics(lambda rows, s=scores: s[rows], histories, targets, 6)["ndcg@6"]
        assert row.ndcg == pytest.approx(personal, rel=1e-9)
        unseen = Histories.from_lists([[i for i in items.tolist() if not seen[u, i]] for u in range(N_USERS)], N_ITEMS)
        segment = rank_metrics(lambda rows, s=scores: s[rows], histories, unseen, 6)["ndcg@6"]
        assert row.segment_ndcg == pytest.approx(segment, rel=1e-9)
    assert torch.equal(model.score_histories(*histories.bags()), before)


def test_steering_towards_a_concept_lists_more_of_it():
    model, sae, histories, targets = world()
    with torch.no_grad():
        sae.W_dec[5] = model.encoder.items()[[3, 8, 9]].mean(0) * 3
    table = steer.steering_table(
        steer.attached(model, sae), lambda a: steer.mix(5, a), torch.tensor([3, 8, 9]), histories, targets, k=6
    )
    assert table[-1].concept_share > table[0].concept_share + 0.1
    assert table[-1].segment_ndcg > table[0].segment_ndcg + 0.1


def test_error_term_leaves_strength_zero_as_the_base_model():
    model, sae, histories, targets = world()
    steered = steer.attached(model, sae, error_term=True)
    table = steer.steering_table(
        steered, lambda a: steer.mix(5, a), torch.tensor([3]), histories, targets, strengths=(0.0,), k=6
    )
    base = rank_metrics(model, histories, targets, 6)["ndcg@6"]
    plain = steer.steering_table(
        steer.attached(model, sae), lambda a: steer.mix(5, a), [3], histories, targets, strengths=(0.0,), k=6
    )
    assert table[0].ndcg == base != plain[0].ndcg


def test_users_who_have_the_whole_concept_are_left_out_of_the_segment():
    model, sae, _, _ = world()
    histories = Histories.from_lists([[0, 1], [0]], N_ITEMS)
    targets = Histories.from_lists([[2], [3]], N_ITEMS)
    scores = torch.zeros(2, N_ITEMS)
    scores[:, 1] = 1

    def table(items):
        return steer.steering_table(
            lambda edit: _Given(scores), lambda a: steer.suppress([1]), items, histories, targets, strengths=(0,), k=2
        )[0]

    assert table([0, 1]).segment_ndcg == 1 and table([0, 1]).concept_share == 1 / 4
    assert math.isnan(table([0]).segment_ndcg)


class _Given:
    """A context that gives fixed scores."""

    def __init__(self, scores):
        self.scores = scores

    def __enter__(self):
        return lambda rows: self.scores[rows]

    def __exit__(self, *_):
        return None


@pytest.mark.parametrize(
    ("items", "error", "match"),
    [
        (torch.zeros(4, dtype=torch.bool), ValueError, r"concept_items must be bool \[n_items = 30\], got \(4,\)"),
        (torch.ones(4), TypeError, "concept_items must be bool or 1-d integers, got torch.float32"),
        ([30], ValueError, r"concept_items must be in \[0, n_items = 30\), got 30 to 30"),
        (torch.zeros(30, dtype=torch.bool), ValueError, "names no item"),
        ([], ValueError, "names no item"),
    ],
)
def test_bad_concept_items(items, error, match):
    model, sae, histories, targets = world()
    with pytest.raises(error, match=match):
        steer.steering_table(steer.attached(model, sae), lambda a: steer.mix(1, a), items, histories, targets)


def test_attached_needs_a_place():
    with pytest.raises(ValueError, match="name must be given, Linear has no hook_point"):
        steer.attached(torch.nn.Linear(2, 2), TopKSAE(2, 4, 1))
