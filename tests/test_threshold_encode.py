"""threshold_encode against its fp64 oracle: exact where the arithmetic is, within derived bounds elsewhere."""

import pytest
import torch
from test_topk_encode import ACTIVATIONS, DTYPES, EPS, oracle_scores, small_integers
from torch.nn.functional import linear

import sae_kernels as sk
from sae_kernels.ops import reference


def oracle(x, W, b, threshold, max_active, activation="relu", mask=None):
    """By the docstring: sets of Python numbers, no tensor algebra but the product."""
    pre, score = oracle_scores(x, W, b, activation)
    limits = torch.as_tensor(threshold, dtype=torch.float64).expand(W.shape[0]).tolist()
    values, indices, counts = [], [], []
    for row, ranked in zip((score if activation == "relu" else pre).tolist(), score.tolist(), strict=True):
        floor = -torch.inf if activation == "none" else 0
        passes = [
            f for f, s in enumerate(ranked) if (s != s or s > max(limits[f], floor)) and (mask is None or mask[f])
        ]
        order = sorted(passes, key=lambda f, r=ranked: (r[f] == r[f], -r[f] if r[f] == r[f] else 0, f))
        others = [f for f in range(len(row)) if f not in set(passes)]
        chosen = (order + others)[:max_active]
        indices.append(chosen)
        values.append([row[f] if j < len(order) else 0.0 for j, f in enumerate(chosen)])
        counts.append(len(order))
    shape = (len(counts), max_active)
    return (
        torch.tensor(values).double().reshape(shape),
        torch.tensor(indices).int().reshape(shape),
        torch.tensor(counts),
    )


def assert_same(got, want):
    assert torch.equal(got[1], want[1]) and torch.equal(got[2], want[2].int())
    torch.testing.assert_close(got[0].double(), want[0].double(), rtol=0, atol=0, equal_nan=True)


def test_by_hand():
    x = torch.tensor([[1.0, 2.0], [0.0, -1.0], [0.0, 0.0]])
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, -2.0]])
    b = torch.tensor([0.0, 0.0, -1.0, 0.0])
    values, indices, counts = sk.threshold_encode(x, W, b, 1.0, max_active=3)  # 1 is not above 1
    assert values.tolist() == [[2, 2, 0], [2, 0, 0], [0, 0, 0]]
    assert indices.tolist() == [[1, 2, 0], [3, 0, 1], [0, 1, 2]] and counts.tolist() == [2, 1, 0]
    values, indices, counts = sk.threshold_encode(x, W, b, 0.0, max_active=1)  # the strongest, and how many there are
    assert (values.tolist(), indices.tolist(), counts.tolist()) == ([[2], [2], [0]], [[1], [3], [0]], [3, 1, 0])
    each = torch.tensor([0.5, 2.0, 0.5, 0.5])
    values, indices, counts = sk.threshold_encode(x, W, b, each, max_active=2)
    assert (values.tolist(), counts.tolist()) == ([[2, 1], [2, 0], [0, 0]], [2, 1, 0])
    assert indices.tolist() == [[2, 0], [3, 0], [0, 1]]
    values, indices, _ = sk.threshold_encode(x, W, b, 1.5, max_active=2, activation="abs")
    assert (values.tolist(), indices.tolist()) == ([[-4, 2], [-2, 2], [0, 0]], [[3, 1], [2, 3], [0, 1]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 97])
def test_exact_arithmetic_entry_for_entry(isa, rows, activation, dtype):
    x, W, b = small_integers(rows, 19, 133, dtype, seed=rows)
    g = torch.Generator().manual_seed(rows)
    mask = torch.rand(133, generator=g) < 0.3
    each = torch.randint(-8, 25, (133,), generator=g)
    for latent_mask, threshold, max_active in (
        (None, 12.0, 7), (None, -torch.inf, 133), (mask, each.to(dtype), 20), (None, each.double(), 64), (mask, 99, 1),
    ):  # fmt: skip
        got = sk.threshold_encode(
            x, W, b, threshold, max_active=max_active, activation=activation, latent_mask=latent_mask
        )
        assert got[0].dtype == dtype and got[1].dtype == got[2].dtype == torch.int32
        assert_same(got, oracle(x, W, b, threshold, max_active, activation, latent_mask))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_is_the_oracle(activation):
    x, W, b = small_integers(9, 7, 61, torch.float32)
    mask = torch.arange(61) % 3 > 0
    for threshold in (torch.tensor([4.0]), torch.arange(61.0) - 30):
        limit = threshold if activation == "none" else threshold.clamp(min=0)
        got = reference.threshold_encode(x, W, b, limit, 20, activation, mask)
        assert_same(got, oracle(x, W, b, threshold, 20, activation, mask))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 200])
def test_random(isa, rows, dtype):
    """Beyond one tile and block; the same latents pass up to the accumulator's rounding at the threshold."""
    g = torch.Generator().manual_seed(rows)
    for d_in, d_sae in ((1, 40), (37, 2100)):
        x, W, b = (torch.randn(*s, generator=g).to(dtype) for s in ((rows, d_in), (d_sae, d_in), (d_sae,)))
        threshold = 2 * d_in**0.5
        values, indices, counts = sk.threshold_encode(x, W, b, threshold, max_active=d_sae)
        pre = linear(x.double(), W.double(), b.double())
        sizes = linear(x.double().abs(), W.double().abs(), b.double().abs())
        error = (d_in + 1) * torch.finfo(reference.accumulator(dtype)).eps * sizes
        low, high = ((pre > threshold + sign * error).sum(-1) for sign in (1, -1))
        assert ((low <= counts) & (counts <= high)).all() and 0 < int(counts.sum()) < rows * d_sae
        dense = torch.zeros_like(pre).scatter_add(1, indices.long(), values.double())
        sure = pre > threshold + error
        assert ((dense - pre).abs() <= error + EPS[dtype] * pre.abs())[sure].all()
        assert not dense[pre < threshold - error].any()
        active = torch.arange(d_sae) < counts[:, None]
        assert (values.diff(dim=-1) <= 0).all() and not values[~active].any() and (values[active] > 0).all()


def test_more_pass_than_there_are_slots(isa):
    """The strongest stay, in every order in which they may come; the count is of all."""
    for rows in (2, 100):
        x = torch.ones(rows, 1)
        for W in (torch.arange(1.0, 3001)[:, None], torch.arange(3000.0, 0, -1)[:, None], torch.ones(3000, 1)):
            values, indices, counts = sk.threshold_encode(x, W, None, 0.5, max_active=10)
            want = sk.topk_encode(x, W, None, 10)
            assert torch.equal(values, want[0]) and torch.equal(indices, want[1])
            assert (counts == 3000).all()


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf(isa, rows, activation):
    x, W, b = small_integers(rows, 9, 70, torch.float32)
    for fill in (torch.nan, torch.inf, -torch.inf):
        bias = b.clone()
        bias[::5] = fill
        for threshold in (3.0, torch.inf, -torch.inf):
            got = sk.threshold_encode(x, W, bias, threshold, max_active=40, activation=activation)
            assert_same(got, oracle(x, W, bias, threshold, 40, activation))
    each = torch.full((70,), torch.nan)
    each[7] = 2.0  # a threshold that is NaN lets nothing pass but NaN
    got = sk.threshold_encode(x, W, b, each, max_active=4, activation=activation)
    assert_same(got, oracle(x, W, b, each.nan_to_num(nan=torch.inf), 4, activation))


def test_shapes_and_strides(isa):
    x, W, b = small_integers(60, 10, 77, torch.float32)
    each = torch.arange(77.0) / 4
    want = sk.threshold_encode(x, W, b, each, max_active=6)
    got = sk.threshold_encode(x.view(3, 20, 10), W, b, each, max_active=6)
    assert got[0].shape == got[1].shape == (3, 20, 6) and got[2].shape == (3, 20)
    assert all(torch.equal(g.flatten(), w.flatten()) for g, w in zip(got, want, strict=True))
    one = sk.threshold_encode(x[0], W, b, each, max_active=6)
    assert one[2].shape == () and torch.equal(one[0], want[0][0])
    strided = (x.mT.contiguous().mT, W.mT.contiguous().mT, b.repeat_interleave(2)[::2])
    got = sk.threshold_encode(*strided, each.repeat_interleave(2)[::2], max_active=6)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    empty = sk.threshold_encode(x[:0].view(4, 0, 10), W, b, 1.0, max_active=6)
    assert empty[0].shape == (4, 0, 6) and empty[2].shape == (4, 0)
    none = sk.threshold_encode(x, W, b, 0.0, max_active=6, latent_mask=torch.zeros(77, dtype=torch.bool))
    assert not none[0].any() and not none[2].any() and none[1][0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend, activation):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5), (11, 5), (11,))
    x, W, b = (torch.randn(*s, dtype=torch.float64, generator=g, requires_grad=True) for s in shapes)
    each = torch.rand(11, dtype=torch.float64, generator=g)

    def values(*leaves):
        return sk.threshold_encode(*leaves, each, max_active=6, activation=activation)[0]

    with sk.backend(backend):
        assert torch.autograd.gradcheck(values, (x, W, b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_against_autograd_of_the_oracle(isa, dtype):
    g = torch.Generator().manual_seed(1)
    x, W, b, grad = (torch.randn(*s, generator=g).to(dtype) for s in ((300, 40), (500, 40), (500,), (300, 100)))
    leaves = [t.clone().requires_grad_() for t in (x, W, b)]
    values, indices, counts = sk.threshold_encode(*leaves, 10.0, max_active=100)
    assert 1000 < int(counts.sum()) and int(counts.max()) <= 100
    values.backward(grad)
    exact = [t.detach().double().requires_grad_() for t in (x, W, b)]
    active = torch.arange(100) < counts[:, None]
    (linear(*exact).gather(-1, indices.long()) * active).backward(grad.double())
    for got, want in zip(leaves, exact, strict=True):
        assert (got.grad.double() - want.grad).norm() < 4 * EPS[dtype] * want.grad.norm()
    x, W = x.detach().requires_grad_(), W.detach()
    sk.threshold_encode(x, W, b, 1e6, max_active=3)[0].sum().backward()
    assert not x.grad.any() and W.grad is None


def test_bits_do_not_depend_on_threads(threads):
    g = torch.Generator().manual_seed(2)
    x, W, b = torch.randn(1000, 48, generator=g), torch.randn(600, 48, generator=g), torch.randn(600, generator=g)
    runs = []
    for n in (1, 2, 5):
        threads(n)
        got = [sk.threshold_encode(x[:rows], W, b, 5.0, max_active=40) for rows in (2, 1000)]
        runs.append([t for result in got for t in result])
    for other in runs[1:]:
        assert all(torch.equal(a, c) for a, c in zip(runs[0], other, strict=True))


def test_registration_compile_and_export():
    x, W, b = small_integers(9, 6, 30, torch.float32)
    op = torch.ops.sae_kernels.threshold_encode.default
    for args in (
        (x, W, b, torch.ones(1), 4, 0, None),
        (x.bfloat16(), W.bfloat16(), None, torch.ones(30), 30, 2, b > 0),
    ):
        torch.library.opcheck(op, args)

    class Encoder(torch.nn.Module):
        def forward(self, x, threshold):
            values, indices, counts = sk.threshold_encode(x, W, b, threshold, max_active=4)
            return values * 2, indices, counts

    each = torch.arange(30.0) / 3
    eager = Encoder()(x, each)
    compiled = torch.compile(Encoder(), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (9, 5):
        assert all(torch.equal(g, w[:rows]) for g, w in zip(compiled(x[:rows], each), eager, strict=True))
    rows = torch.export.Dim("rows")
    exported = torch.export.export(Encoder(), (x, each), dynamic_shapes={"x": {0: rows}, "threshold": None}).module()
    assert torch.equal(exported(x[:5], each)[0], eager[0][:5])
    grads = []
    compile = torch.compile(fullgraph=True, backend="aot_eager")
    for wrap in (compile, lambda f: f):
        leaf = W.clone().requires_grad_()
        wrap(lambda w: sk.threshold_encode(x, w, b, 2.0, max_active=4)[0].sum())(leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads) and grads[0].any()


def test_thresholds_meet_unrounded_numbers():
    """Under autocast and in bfloat16: what is rounded up to the threshold's other side does not pass."""
    x, W = torch.ones(1, 2), torch.tensor([[1.0, 2**-10], [1.0, 0.0], [1.0, -(2**-10)]])
    for backend in ("cpu", "reference"):
        with sk.backend(backend):
            values, indices, counts = sk.threshold_encode(x.bfloat16(), W.bfloat16(), None, 1.0, max_active=3)
            assert counts.tolist() == [1] and indices[0, 0] == 0 and values[0].tolist() == [1, 0, 0]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                values, _, counts = sk.threshold_encode(x.bfloat16(), W, None, 1.0, max_active=3)
            assert values.dtype == torch.bfloat16 and counts.tolist() == [1]


def test_bad_input():
    x, W, b = small_integers(9, 6, 30, torch.float32)
    cases = [
        (ValueError, r"threshold_encode: x \(9, 5\) must end in d_in = 6", (x[:, :5], W, b, 1.0), 4),
        (ValueError, "max_active must be between 1 and 30, got 31", (x, W, b, 1.0), 31),
        (TypeError, "max_active must be an int, got NoneType", (x, W, b, 1.0), None),
        (TypeError, "threshold must be a number or a tensor, got str", (x, W, b, "1"), 4),
        (TypeError, "threshold must be a number or a tensor, got bool", (x, W, b, True), 4),
        (ValueError, "threshold must not be NaN", (x, W, b, float("nan")), 4),
        (TypeError, "threshold must be float32.*int64", (x, W, b, torch.ones(30).long()), 4),
        (ValueError, r"threshold must be \[\] or \[d_sae\] = \[30\], got shape \(29,\)", (x, W, b, torch.ones(29)), 4),
        (ValueError, "threshold is on meta and x is on cpu", (x, W, b, torch.ones(30, device="meta")), 4),
    ]
    for error, message, args, max_active in cases:
        with pytest.raises(error, match=message):
            sk.threshold_encode(*args, max_active=max_active)
    with pytest.raises(ValueError, match="activation must be one of relu, none, abs, got 'gelu'"):
        sk.threshold_encode(x, W, b, 1.0, max_active=4, activation="gelu")
    with pytest.raises(ValueError, match=r"latent_mask must be bool \[30\]"):
        sk.threshold_encode(x, W, b, 1.0, max_active=4, latent_mask=torch.ones(29, dtype=torch.bool))
