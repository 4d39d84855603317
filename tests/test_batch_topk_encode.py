"""batch_topk_encode against its fp64 oracle."""

import importlib

import pytest
import torch
from test_topk_encode import ACTIVATIONS, DTYPES, EPS, oracle_scores, small_integers
from torch.nn.functional import linear

import sae_kernels as sk
from sae_kernels.ops import reference

module = importlib.import_module("sae_kernels.ops.batch_topk_encode")


def oracle(x, W, b, k, max_active, activation="relu", mask=None):
    """By the docstring: one sorted list of (score, row, latent). Returns the code [N, d_sae], counts and threshold."""
    pre, score = oracle_scores(x, W, b, activation)
    floor = -torch.inf if activation == "none" else 0
    entries = []
    for n, row in enumerate(score.tolist()):
        order = sorted(range(len(row)), key=lambda f, r=row: (r[f] == r[f], -r[f] if r[f] == r[f] else 0, f))
        mine = [f for f in order if (row[f] > floor or row[f] != row[f]) and (mask is None or mask[f])]
        entries += [(row[f] == row[f], -row[f] if row[f] == row[f] else 0, n, f) for f in mine[:max_active]]
    chosen = sorted(entries)[: k * len(x)]
    code = torch.zeros_like(pre)
    for _, _, n, f in chosen:
        code[n, f] = (score if activation == "relu" else pre)[n, f]
    counts = torch.tensor([sum(n == row for _, _, row, _ in chosen) for n in range(len(x))])
    return code, counts, score[chosen[-1][2], chosen[-1][3]].item() if chosen else 0.0


def assert_same(got, want, d_sae):
    values, indices, counts, threshold = got
    ordered = indices.sort(-1).values
    assert (ordered.diff(dim=-1) > 0).all() and ((ordered >= 0) & (ordered < d_sae)).all()
    active = torch.arange(values.shape[-1]) < counts[:, None]
    assert not values[~active].nan_to_num(nan=1).any()
    code = torch.zeros(len(values), d_sae, dtype=torch.float64)
    code.scatter_(1, indices.long(), values.double())
    torch.testing.assert_close(code, want[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(counts, want[1].int())
    torch.testing.assert_close(threshold.double(), torch.tensor(want[2]).double(), rtol=0, atol=0, equal_nan=True)


def test_by_hand():
    x = torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.0]])
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, -2.0]])
    values, indices, counts, threshold = sk.batch_topk_encode(x, W, None, 1, max_active=2)  # 3 of 3 3 3 2 2 1 1
    assert (values.tolist(), counts.tolist(), threshold.item()) == ([[3, 0], [0, 0], [3, 3]], [1, 0, 2], 3)
    assert indices[0, 0] == 2 and indices[2].tolist() == [0, 2]
    values, _, counts, threshold = sk.batch_topk_encode(x, W, None, 2, max_active=2)  # 6, and there are but 5
    assert (values.tolist(), counts.tolist(), threshold.item()) == ([[3, 2], [2, 0], [3, 3]], [2, 1, 2], 2)
    values, _, counts, _ = sk.batch_topk_encode(x, W, None, 1, max_active=1)
    assert (values.tolist(), counts.tolist()) == ([[3], [2], [3]], [1, 1, 1])
    assert sk.batch_topk_encode(x, W, None, 1)[0].shape == (3, 4)
    x = torch.ones(5, 1)  # ties: the lower rows, then the lower latents
    values, indices, counts, _ = sk.batch_topk_encode(x, torch.ones(4, 1), None, 2, max_active=3)
    assert counts.tolist() == [3, 3, 3, 1, 0] and indices[0].tolist() == [0, 1, 2] and indices[3, 0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 100])
def test_exact_arithmetic_entry_for_entry(isa, rows, activation, dtype):
    """Rows of very different strength: some of them reach the cap, some contribute nothing."""
    x, W, b = small_integers(rows, 9, 67, dtype, seed=rows)
    x = x * (1 + torch.arange(rows) % 3)[:, None].to(dtype)
    mask = torch.arange(67) % 3 > 0
    for latent_mask, k, max_active in ((None, 3, 12), (mask, 5, 20), (None, 4, 4), (None, 40, 67), (mask, 7, 3)):
        got = sk.batch_topk_encode(x, W, b, k, max_active=max_active, activation=activation, latent_mask=latent_mask)
        assert got[0].dtype == dtype and got[3].dtype == reference.accumulator(dtype)
        assert_same(got, oracle(x, W, b, k, max_active, activation, latent_mask), 67)


def test_the_reference_is_the_oracle():
    x, W, b = small_integers(20, 9, 67, torch.float32)
    for activation in ACTIVATIONS:
        got = reference.batch_topk_encode(x, W, b, 5, 11, activation)
        assert_same(got, oracle(x, W, b, 5, 11, activation), 67)


@pytest.mark.parametrize(
    "order", ["strong rows last", "strong rows between the sampled", "few fire", "none fires", "equal"]
)
def test_guesses_that_fail(monkeypatch, order):
    """Right whether or not the guess lets enough pass; the second pass is made where it must be."""
    calls = []
    once = module.threshold_with
    monkeypatch.setattr(module, "threshold_with", lambda *a: calls.append(a) or once(*a))
    x, W, b = small_integers(256, 5, 40, torch.float32)
    if order == "strong rows last":
        x[200:] *= 8
    elif order == "strong rows between the sampled":
        x[::5] *= 8  # every fifth row is looked at for the guess
    elif order == "few fire":
        b = b - 20
    elif order == "none fires":
        b = b - 1000
    else:
        x, W, b = torch.ones(256, 5), torch.ones(40, 5), torch.zeros(40)
    assert_same(sk.batch_topk_encode(x, W, b, 4), oracle(x, W, b, 4, 16), 40)
    again = {"strong rows last": 1, "strong rows between the sampled": 2, "few fire": 1, "none fires": 1, "equal": 2}
    assert len(calls) == again[order]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf(isa, activation):
    x, W, b = small_integers(20, 5, 40, torch.float32)
    for fill in (torch.nan, torch.inf, -torch.inf):
        bias = b.clone()
        bias[::9] = fill
        for k in (2, 6):
            got = sk.batch_topk_encode(x, W, bias, k, activation=activation)
            assert_same(got, oracle(x, W, bias, k, 4 * k, activation), 40)


def test_random_against_torch(isa):
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(700, 33, generator=g), torch.randn(900, 33, generator=g)
    values, indices, counts, threshold = sk.batch_topk_encode(x, W, None, 16, max_active=300)
    pre = linear(x.double(), W.double())
    flat = pre.relu().flatten().topk(16 * 700).values
    assert int(counts.sum()) == 16 * 700 and 64 < int(counts.max()) < 300
    error = 34 * EPS[torch.float32] * linear(x.double().abs(), W.double().abs()).max()
    got = values.double().flatten().sort(descending=True).values[: 16 * 700]
    assert ((got - flat).abs() <= error).all() and abs(threshold - flat[-1]) <= error
    active = torch.arange(300) < counts[:, None]
    assert ((values - pre.gather(1, indices.long())).abs()[active] <= error).all()


def test_shapes():
    x, W, b = small_integers(60, 10, 77, torch.float32)
    want = sk.batch_topk_encode(x, W, b, 6)
    got = sk.batch_topk_encode(x.view(3, 20, 10), W, b, 6)
    assert got[0].shape == (3, 20, 24) and got[2].shape == (3, 20) and got[3].shape == ()
    assert all(torch.equal(g.flatten(), w.flatten()) for g, w in zip(got, want, strict=True))
    one = sk.batch_topk_encode(x[0], W, b, 6)  # a batch of one row is topk_encode
    assert torch.equal(one[0][:6], sk.topk_encode(x[0], W, b, 6)[0]) and one[2] == (one[0] > 0).sum()
    empty = sk.batch_topk_encode(x[:0], W, b, 6)
    assert empty[0].shape == (0, 24) and empty[2].shape == (0,) and empty[3] == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend, activation):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5), (11, 5), (11,))
    x, W, b = (torch.randn(*s, dtype=torch.float64, generator=g, requires_grad=True) for s in shapes)

    def values(*leaves):
        return sk.batch_topk_encode(*leaves, 3, max_active=8, activation=activation)[0]

    with sk.backend(backend):
        assert torch.autograd.gradcheck(values, (x, W, b))


def test_gradient_of_narrow_floats(isa):
    g = torch.Generator().manual_seed(1)
    for dtype in DTYPES:
        x, W, grad = (torch.randn(*s, generator=g).to(dtype) for s in ((100, 40), (300, 40), (100, 32)))
        leaves = [t.clone().requires_grad_() for t in (x, W)]
        values, indices, counts, threshold = sk.batch_topk_encode(*leaves, None, 8)
        assert not threshold.requires_grad and not counts.requires_grad
        values.backward(grad)
        exact = [t.double().requires_grad_() for t in (x, W)]
        active = torch.arange(32) < counts[:, None]
        (linear(*exact).gather(-1, indices.long()) * active).backward(grad.double())
        for got, want in zip(leaves, exact, strict=True):
            assert (got.grad.double() - want.grad).norm() < 4 * EPS[dtype] * want.grad.norm()


def test_bits_do_not_depend_on_threads(threads):
    g = torch.Generator().manual_seed(2)
    x, W = torch.randn(1000, 48, generator=g), torch.randn(600, 48, generator=g)
    runs = []
    for n in (1, 2, 5):
        threads(n)
        runs.append(sk.batch_topk_encode(x, W, None, 8))
    for other in runs[1:]:
        assert all(torch.equal(a, c) for a, c in zip(runs[0], other, strict=True))


def test_registration_compile_and_export():
    x, W, b = small_integers(9, 6, 30, torch.float32)
    ops = torch.ops.sae_kernels
    torch.library.opcheck(ops.batch_topk_encode.default, (x, W, b, 3, 12, "relu", None, "cpu"))
    values, _, counts = sk.threshold_encode(x, W, b, 0.0, max_active=12)
    torch.library.opcheck(ops.batch_keep.default, (values, counts, 20, False))

    class Encoder(torch.nn.Module):
        def forward(self, x):
            return sk.batch_topk_encode(x, W, b, 3)

    compiled = torch.compile(Encoder(), fullgraph=True, backend="aot_eager", dynamic=True)
    exported = torch.export.export(Encoder(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows")}}).module()
    for rows in (9, 5):
        eager = Encoder()(x[:rows])
        for run in (compiled, exported):
            assert all(torch.equal(g, w) for g, w in zip(run(x[:rows]), eager, strict=True))
    grads = []
    compile = torch.compile(fullgraph=True, backend="aot_eager")
    for wrap in (compile, lambda f: f):
        leaf = W.clone().requires_grad_()
        wrap(lambda w: sk.batch_topk_encode(x, w, b, 3)[0].sum())(leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads) and grads[0].any()


def test_autocast_chooses_on_full_precision():
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(50, 32, generator=g).bfloat16(), torch.randn(400, 32, generator=g)
    plain = sk.batch_topk_encode(x.float(), W, None, 8)
    for backend in ("cpu", "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16), sk.backend(backend):
            got = sk.batch_topk_encode(x, W, None, 8)
        assert got[0].dtype == torch.bfloat16 and torch.equal(got[2], plain[2])
        torch.testing.assert_close(got[3], plain[3], rtol=1e-5, atol=0)


def test_bad_input():
    x, W, b = small_integers(9, 6, 30, torch.float32)
    cases = [
        (ValueError, r"batch_topk_encode: x \(9, 5\) must end in d_in = 6", (x[:, :5], W, b, 4), {}),
        (ValueError, "k must be between 1 and 30, got 31", (x, W, b, 31), {}),
        (TypeError, "k must be an int, got float", (x, W, b, 4.0), {}),
        (ValueError, "max_active must be between 1 and 30, got 0", (x, W, b, 4), {"max_active": 0}),
        (ValueError, "activation must be one of", (x, W, b, 4), {"activation": "gelu"}),
        (ValueError, "latent_mask must be bool", (x, W, b, 4), {"latent_mask": b}),
    ]
    for error, message, args, options in cases:
        with pytest.raises(error, match=message):
            sk.batch_topk_encode(*args, **options)
