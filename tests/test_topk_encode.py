"""topk_encode against its fp64 oracle: exact where the arithmetic is, within derived bounds elsewhere."""

import numpy as np
import pytest
import torch
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

import sae_kernels as sk
from sae_kernels.ops import reference
from sae_kernels.ops.topk_encode import ACTIVATIONS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


def small_integers(rows, d_in, d_sae, dtype, seed=0):
    """Products and sums of these are exact in every dtype, and many pre-activations tie."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (rows, d_in), generator=g).to(dtype)
    W = torch.randint(-2, 3, (d_sae, d_in), generator=g).to(dtype)
    b = torch.randint(-3, 4, (d_sae,), generator=g).to(dtype)
    return x, W, b


def in_two_columns_of_eight(d_sae, d_in=2):
    """x [1, d_in] and W whose latents are above 0, in descending order, where f % 8 is 0 or 1: to a kernel that deals a
    row's latents out to several buffers, all that passes goes into one of them.
    """
    f = torch.arange(d_sae)
    scores = torch.full((d_sae,), -1.0)
    scores[f % 8 < 2] = torch.arange(int((f % 8 < 2).sum()), 0, -1).float()
    W = torch.zeros(d_sae, d_in)
    W[:, 0], W[:, 1] = scores // 32 * 32, scores - scores // 32 * 32  # exact in bfloat16
    x = torch.zeros(1, d_in)
    x[:, :2] = 1
    return x.bfloat16(), W.bfloat16()


def oracle_scores(x, W, b, activation):
    pre = linear(x.double(), W.double(), None if b is None else b.double())
    return pre, {"relu": pre.relu(), "none": pre, "abs": pre.abs()}[activation]


def assert_is_topk(values, indices, x, W, b, k, activation="relu"):
    """The contract up to the rounding of the accumulator: right values, right order, nothing better left out."""
    pre, score = oracle_scores(x, W, b, activation)
    chosen = indices.long()
    assert ((chosen >= 0) & (chosen < W.shape[0])).all()
    assert (chosen.sort(-1).values.diff(dim=-1) > 0).all(), "an index stands twice in a row"
    # |computed - exact| <= n_ops * eps * sum |x_i w_i|
    accumulator = reference.accumulator(x.dtype)
    sizes = [None if t is None else t.double().abs() for t in (x, W, b)]
    magnitude = linear(*sizes).amax(-1, keepdim=True)
    error = (x.shape[1] + 1) * torch.finfo(accumulator).eps * magnitude
    value = pre if activation != "relu" else score
    slack = error + EPS[x.dtype] * score.amax(-1, keepdim=True)
    assert ((values.double() - value.gather(-1, chosen)).abs() <= slack).all()
    assert (score.gather(-1, chosen) >= score.topk(k).values[:, -1:] - 2 * error).all()
    rank = values.double().abs() if activation == "abs" else values.double()
    assert (rank.diff(dim=-1) <= 0).all()


def test_by_hand():
    x = torch.tensor([[1.0, 2.0], [0.0, -1.0], [0.0, 0.0]])
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, -2.0]])
    b = torch.tensor([0.0, 0.0, -1.0, 0.0])
    values, indices = sk.topk_encode(x, W, b, 2)
    assert values.tolist() == [[2, 2], [2, 0], [0, 0]]
    assert indices.tolist() == [[1, 2], [3, 0], [0, 1]]
    assert sk.topk_encode(x, W, b, 2, activation="none")[0].tolist() == [[2, 2], [2, 0], [0, 0]]
    values, indices = sk.topk_encode(x, W, b, 2, activation="abs")
    assert (values.tolist(), indices.tolist()) == ([[-4, 2], [-2, 2], [-1, 0]], [[3, 1], [2, 3], [2, 0]])
    values, indices = sk.topk_encode(x, W, None, 3, latent_mask=torch.tensor([False, True, True, False]))
    assert (values.tolist(), indices.tolist()) == ([[3, 2, 0], [0, 0, 0], [0, 0, 0]], [[2, 1, 0], [1, 2, 0], [1, 2, 0]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 7, 96, 97])
def test_ties_index_for_index(isa, rows, activation, dtype):
    x, W, b = small_integers(rows, 19, 517, dtype, seed=rows)
    mask = torch.rand(517, generator=torch.Generator().manual_seed(rows)) < 0.1
    for latent_mask in (None, mask):
        for k in (1, 33, 517):
            got = sk.topk_encode(x, W, b, k, activation=activation, latent_mask=latent_mask)
            want = reference.topk_encode(x.double(), W.double(), b.double(), k, activation, latent_mask)
            assert torch.equal(got[0].double(), want[0]) and torch.equal(got[1], want[1])


def test_ties_agree_with_torch_sort():
    x, W, b = small_integers(64, 24, 300, torch.float32)
    values, indices = sk.topk_encode(x, W, b, 20)
    want = linear(x, W, b).relu().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, want.values[:, :20]) and torch.equal(indices.long(), want.indices[:, :20])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [3, 99])
def test_random(isa, rows, activation, dtype):
    g = torch.Generator().manual_seed(rows)
    for d_in, d_sae, k in ((1, 40, 3), (37, 333, 32), (130, 2100, 64)):
        x = torch.randn(rows, d_in, generator=g).to(dtype)
        W, b = torch.randn(d_sae, d_in, generator=g).to(dtype), torch.randn(d_sae, generator=g).to(dtype)
        assert_is_topk(*sk.topk_encode(x, W, b, k, activation=activation), x, W, b, k, activation)


def adversarial(kind):
    """x, W, b with d_in 12 and d_sae 3000 whose pre-activations have an order that costs a careless filter most."""
    g = torch.Generator().manual_seed(3)
    x, W, b = torch.rand(100, 12, generator=g), torch.rand(3000, 12, generator=g), torch.zeros(3000)
    if kind == "ascending by column":
        W *= torch.linspace(0.1, 5, 3000)[:, None]
    elif kind == "descending by column":
        W *= torch.linspace(5, 0.1, 3000)[:, None]
    elif kind == "clustered":
        W = torch.rand(30, 12, generator=g).repeat_interleave(100, 0) + 1e-3 * W
    elif kind == "all negative":
        b -= 100
    elif kind == "constant":
        W = torch.ones(3000, 12)
    return x, W, b


ORDERS = ["ascending by column", "descending by column", "clustered", "all negative", "constant"]


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("rows", [6, 100])
def test_adversarial_orders(isa, rows, kind):
    x, W, b = adversarial(kind)
    x = x[:rows]
    for k in (1, 32, 700):
        values, indices = sk.topk_encode(x, W, b, k)
        assert_is_topk(values, indices, x, W, b, k)
        if kind in ("all negative", "constant"):
            assert torch.equal(indices, torch.arange(k, dtype=torch.int32).expand(rows, k))


def test_padding_lanes_do_not_compete(isa):
    """d_sae just past a register tile, everything negative: the zeros of the padding must not win under "none"."""
    g = torch.Generator().manual_seed(5)
    for d_sae in (65, 129, 513):
        x, W = torch.rand(100, 8, generator=g), -torch.rand(d_sae, 8, generator=g)
        assert_is_topk(*sk.topk_encode(x, W, None, 16, activation="none"), x, W, None, 16, "none")


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf(isa, rows, activation):
    x, W, b = small_integers(rows, 9, 150, torch.float32)
    for special in ([3], list(range(0, 150, 2))):
        for fill in (torch.nan, torch.inf, -torch.inf):
            bias = b.clone()
            bias[special] = fill
            for k in (1, 5, 80):
                got = sk.topk_encode(x, W, bias, k, activation=activation)
                want = reference.topk_encode(x, W, bias, k, activation)
                assert torch.equal(got[1], want[1])
                torch.testing.assert_close(got[0], want[0], rtol=0, atol=0, equal_nan=True)
    x[0, 0] = torch.nan
    values, indices = sk.topk_encode(x, W, b, 4, activation=activation)
    assert values[0].isnan().all() and indices[0].tolist() == [0, 1, 2, 3]


def test_shapes_and_strides(isa):
    x, W, b = small_integers(60, 10, 77, torch.float32)
    values, indices = sk.topk_encode(x, W, b, 6)
    v3, i3 = sk.topk_encode(x.view(3, 20, 10), W, b, 6)
    assert v3.shape == i3.shape == (3, 20, 6)
    assert torch.equal(v3.view(60, 6), values) and torch.equal(i3.view(60, 6), indices)
    v1, i1 = sk.topk_encode(x[0], W, b, 6)
    assert torch.equal(v1, values[0]) and torch.equal(i1, indices[0])
    strided = sk.topk_encode(x.mT.contiguous().mT, W.mT.contiguous().mT, b.repeat_interleave(2)[::2], 6)
    assert torch.equal(strided[0], values) and torch.equal(strided[1], indices)
    for shape in ((0, 10), (4, 0, 10)):
        v0, i0 = sk.topk_encode(torch.empty(shape), W, b, 6)
        assert v0.shape == i0.shape == (*shape[:-1], 6) and i0.dtype == torch.int32


def test_no_competitor():
    x, W, b = small_integers(60, 10, 12, torch.float32)
    for rows in (1, 60):
        values, indices = sk.topk_encode(x[:rows], W, b, 4, latent_mask=torch.zeros(12, dtype=torch.bool))
        assert not values.any() and torch.equal(indices, torch.arange(4, dtype=torch.int32).expand(rows, 4))


def test_several_blocks_and_chunks(isa):
    """Weights beyond one block, candidates beyond one chunk of rows."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(100, 700, generator=g), torch.randn(7000, 700, generator=g)
    assert_is_topk(*sk.topk_encode(x, W, None, 20), x, W, None, 20)
    x, W = torch.randn(9000, 3, generator=g), torch.randn(300, 3, generator=g)
    assert_is_topk(*sk.topk_encode(x, W, None, 200), x, W, None, 200)


def test_more_than_2_to_31_pre_activations():
    rows, d_sae = 40_000, 60_000
    assert rows * d_sae > 2**31
    x = torch.linspace(-1, 1, rows)[:, None]
    W = torch.linspace(-1, 1, d_sae)[:, None]
    values, indices = sk.topk_encode(x, W, None, 1)
    assert torch.equal(indices[:, 0], torch.where(x[:, 0] < 0, 0, d_sae - 1).to(torch.int32))
    assert torch.equal(values[:, 0], x[:, 0].abs())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 400), st.data())
def test_any_shape(rows, d_in, d_sae, data):
    k = data.draw(st.integers(1, d_sae))
    activation = data.draw(st.sampled_from(ACTIVATIONS))
    x, W, b = small_integers(rows, d_in, d_sae, torch.float32, seed=data.draw(st.integers(0, 9)))
    got = sk.topk_encode(x, W, b, k, activation=activation)
    want = reference.topk_encode(x, W, b, k, activation)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend, activation):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5), (11, 5), (11,))
    x, W, b = (torch.randn(*s, dtype=torch.float64, generator=g, requires_grad=True) for s in shapes)
    mask = torch.arange(11) % 3 > 0
    with sk.backend(backend):
        for latent_mask in (None, mask):
            assert torch.autograd.gradcheck(
                lambda *t, m=latent_mask: sk.topk_encode(*t, 4, activation=activation, latent_mask=m)[0], (x, W, b)
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_against_autograd_of_the_oracle(isa, dtype):
    g = torch.Generator().manual_seed(1)
    x, W, b, grad = (torch.randn(*s, generator=g).to(dtype) for s in ((300, 40), (500, 40), (500,), (300, 16)))
    leaves = [t.clone().requires_grad_() for t in (x, W, b)]
    values, indices = sk.topk_encode(*leaves, 16)
    values.backward(grad)
    exact = [t.double().requires_grad_() for t in (x, W, b)]
    linear(*exact).relu().gather(-1, indices.long()).backward(grad.double())
    for got, want in zip(leaves, exact, strict=True):
        error = (got.grad.double() - want.grad).norm() / want.grad.norm()
        assert error < 4 * EPS[dtype]


def test_relu_zeros_pass_no_gradient():
    x, W, b = small_integers(20, 6, 30, torch.float32)
    leaves = [t.requires_grad_() for t in (x, W, b - 1000)]
    values, _ = sk.topk_encode(*leaves, 5)
    values.sum().backward()
    assert not any(t.grad.any() for t in (x, W))


def test_gradient_only_where_asked():
    x, W, b = small_integers(20, 6, 30, torch.float32)
    sk.topk_encode(x, W.requires_grad_(), b, 5)[0].sum().backward()
    assert x.grad is None and b.grad is None and W.grad is not None
    values, indices = sk.topk_encode(x, W.detach(), b, 5)
    assert not values.requires_grad and not indices.requires_grad


def test_bits_do_not_depend_on_threads(threads):
    g = torch.Generator().manual_seed(2)
    x, W, b = torch.randn(3000, 48, generator=g), torch.randn(600, 48, generator=g), torch.randn(600, generator=g)
    runs = []
    for n in (1, 2, 5):
        threads(n)
        leaves = [t.clone().requires_grad_() for t in (x, W, b)]
        values, indices = sk.topk_encode(*leaves, 24)
        (values * values).sum().backward()
        few = sk.topk_encode(x[:2], W, b, 24)
        runs.append([values.detach(), indices, *(t.grad for t in leaves), *few])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_registration():
    for dtype in (torch.float32, torch.bfloat16):
        x, W, b = small_integers(9, 6, 30, dtype)
        mask = torch.arange(30) % 2 == 0
        op = torch.ops.sae_kernels.topk_encode.default
        for args in ((x, W, b, 4, 0, None), (x.mT.contiguous().mT, W, None, 4, 2, mask), (x[:0], W, b, 4, 1, None)):
            torch.library.opcheck(op, args)
        grad, indices = torch.randn(9, 4).to(dtype), torch.randint(0, 30, (9, 4), dtype=torch.int32)
        torch.library.opcheck(torch.ops.sae_kernels.topk_encode_backward.default, (grad, indices, x, 30))


def test_compile_and_export():
    x, W, b = small_integers(9, 6, 30, torch.float32)

    class Encoder(torch.nn.Module):
        def forward(self, x):
            values, indices = sk.topk_encode(x, W, b, 4)
            return values * 2, indices

    eager = Encoder()(x)
    compiled = torch.compile(Encoder(), fullgraph=True, dynamic=True)
    for rows in (9, 5):
        got = compiled(x[:rows])
        assert torch.equal(got[0], eager[0][:rows]) and torch.equal(got[1], eager[1][:rows])
    exported = torch.export.export(Encoder(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows")}}).module()
    assert torch.equal(exported(x[:5])[0], eager[0][:5])
    leaf = W.clone().requires_grad_()
    torch.compile(lambda w: sk.topk_encode(x, w, b, 4)[0].sum(), fullgraph=True)(leaf).backward()
    want = W.clone().requires_grad_()
    sk.topk_encode(x, want, b, 4)[0].sum().backward()
    assert torch.equal(leaf.grad, want.grad)


def test_autocast_selects_on_full_precision():
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(50, 32, generator=g).bfloat16(), torch.randn(400, 32, generator=g)
    plain = sk.topk_encode(x.float(), W, None, 8)
    for backend in ("cpu", "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16), sk.backend(backend):
            values, indices = sk.topk_encode(x, W, None, 8)
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, plain[0].bfloat16()) and torch.equal(indices, plain[1])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_sae_trained_by_others(isa):
    sae = np.load(SHARED / "models" / "recsae_ml1m_sae_k16_2048.npz")
    W, b, W_dec, b_dec = (torch.from_numpy(sae[n]) for n in ("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
    x, want, index = (torch.from_numpy(sae[n]) for n in ("acts", "topk_val", "topk_idx"))
    values, indices = sk.topk_encode(x - b_dec, W, b, 16)
    rounding = 65 * EPS[torch.float32] * linear((x - b_dec).abs(), W.abs(), b.abs()).amax(-1, keepdim=True)
    assert ((values - want.sort(-1, descending=True).values).abs() <= rounding).all()
    differ = indices.sort(-1).values != index.sort(-1).values
    gap = (values[:, -1:] - linear(x - b_dec, W, b).relu().topk(17).values[:, -1:]).expand_as(values)
    assert (gap[differ] <= 2 * rounding.expand_as(values)[differ]).all()
    recon = torch.from_numpy(sae["recon"])
    torch.testing.assert_close(sk.sparse_decode(values, indices, W_dec, b_dec)[:512], recon, rtol=1e-5, atol=1e-5)


def test_bad_input():
    x, W, b = small_integers(9, 6, 30, torch.float32)
    cases = [
        (ValueError, r"x \(9, 5\) must end in d_in = 6", (x[:, :5], W, b, 4)),
        (ValueError, "W_enc must have 2 dimensions", (x, W[0], b, 4)),
        (ValueError, r"b_enc \(29,\)", (x, W, b[1:], 4)),
        (ValueError, "k must be between 1 and 30, got 0", (x, W, b, 0)),
        (ValueError, "k must be between 1 and 30, got 31", (x, W, b, 31)),
        (TypeError, "k must be an int, got float", (x, W, b, 4.0)),
        (TypeError, "k must be an int, got bool", (x, W, b, True)),
        (TypeError, "x must be float32.*int64", (x.long(), W.long(), b.long(), 4)),
        (TypeError, "W_enc is torch.float64 and x is torch.float32", (x, W.double(), b, 4)),
        (TypeError, "x must be a tensor, got list", ([1.0], W, b, 4)),
        (ValueError, "W_enc is on meta and x is on cpu", (x, W.to("meta"), b, 4)),
    ]
    for error, message, args in cases:
        with pytest.raises(error, match=message):
            sk.topk_encode(*args)
    with pytest.raises(ValueError, match="activation must be one of relu, none, abs, got 'gelu'"):
        sk.topk_encode(x, W, b, 4, activation="gelu")
    for mask in (torch.ones(29, dtype=torch.bool), torch.ones(30)):
        with pytest.raises(ValueError, match=r"latent_mask must be bool \[30\]"):
            sk.topk_encode(x, W, b, 4, latent_mask=mask)


def test_forward_mode_says_that_there_is_none():
    """Frozen weights or not: a tangent is never dropped in silence."""
    x, W = torch.randn(3, 5), torch.randn(12, 5)
    values, indices = sk.topk_encode(x, W, None, 2)
    for f, at in (
        (lambda x: sk.topk_encode(x, W, None, 2)[0], x),
        (lambda x: sk.threshold_encode(x, W, None, 0.1, max_active=3)[0], x),
        (lambda x: sk.batch_topk_encode(x, W, None, 2)[0], x),
        (lambda values: sk.sparse_decode(values, indices, W), values),
        (lambda x: sk.sae_loss(x, values, indices, W).errors, x),
    ):
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(f, (at,), (torch.ones_like(at),))
