"""The Triton kernels of topk_encode against the fp64 oracle, on a GPU or in Triton's interpreter."""

import dataclasses

import pytest
import torch
from torch.nn.functional import linear
from triton_interpreter import DEVICE, INTERPRETED, need_a_place_to_run, patch_interpreter

need_a_place_to_run()

import triton.language as tl  # noqa: E402
from test_topk_encode import EPS, adversarial, assert_is_topk, small_integers  # noqa: E402

import sae_kernels as sk  # noqa: E402
from sae_kernels.kernels import topk_encode as kernel  # noqa: E402
from sae_kernels.kernels import topk_encode_fused as fused  # noqa: E402
from sae_kernels.kernels import topk_select, tuning  # noqa: E402
from sae_kernels.ops import reference  # noqa: E402
from sae_kernels.ops.topk_encode import ACTIVATIONS  # noqa: E402

OWN_SORT = tl.sort
if INTERPRETED:
    patch_interpreter()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def on_triton():
    with sk.backend("triton"):
        yield


@pytest.fixture
def small_chunks(monkeypatch):
    """Slabs of 4 rows x 100 latents: every row and every running list passes several."""
    monkeypatch.setattr(tuning, "slab_shape", lambda rows, d_sae, nbytes: (min(rows, 4), min(d_sae, 100)))


def on_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def run(x, W, b, k, activation=0, mask=None, path="auto"):
    return [t.cpu() for t in kernel.topk_encode(*on_device(x, W, b), k, activation, *on_device(mask), path)]


def assert_same(got, want):
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0].double(), want[0].double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("path", ["slab", "sort"])
@pytest.mark.parametrize("activation", range(3))
def test_ties_index_for_index(path, activation):
    x, W, b = small_integers(3, 9, 417, torch.float32, seed=activation)
    mask = torch.rand(417, generator=torch.Generator().manual_seed(1)) < 0.1
    for latent_mask in (None, mask):
        for k in (1, 33, 417):
            got = run(x, W, b, k, activation, latent_mask, path if k <= tuning.LARGEST_K else "auto")
            assert_same(got, reference.topk_encode(x, W, b, k, ACTIVATIONS[activation], latent_mask))


@pytest.mark.parametrize("activation", range(3))
def test_chunks_of_rows_and_latents(small_chunks, activation):
    x, W, b = small_integers(6, 9, 250, torch.float32)
    mask = torch.arange(250) % 7 == 3
    for k, latent_mask in ((1, None), (20, mask), (130, None)):
        got = run(x, W, b, k, activation, latent_mask, "slab")
        assert_same(got, reference.topk_encode(x, W, b, k, ACTIVATIONS[activation], latent_mask))


@pytest.mark.parametrize("activation", range(3))
def test_ties_index_for_index_fused(activation):
    """Rows with many, few and no positive latents."""
    for k, shift in ((1, 0), (33, 0), (33, 17), (33, 99)):
        x, W, b = small_integers(3, 9, 1030, torch.float32, seed=k)
        got = run(x, W, b - shift, k, activation, None, "fused")
        assert_same(got, reference.topk_encode(x, W, b - shift, k, ACTIVATIONS[activation]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_random(dtype):
    g = torch.Generator().manual_seed(3)
    for d_in, d_sae, k in ((1, 40, 3), (37, 333, 32), (70, 700, 5)):
        x, W, b = (torch.randn(*s, generator=g).to(dtype) for s in ((4, d_in), (d_sae, d_in), (d_sae,)))
        for path in ("slab", "sort") if d_sae < 700 else ("fused",):
            for activation, name in enumerate(ACTIVATIONS):
                assert_is_topk(*run(x, W, b, k, activation, None, path), x, W, b, k, name)


@pytest.mark.parametrize("path", ["slab", "fused"])
@pytest.mark.parametrize(
    "kind", ["ascending by column", "descending by column", "clustered", "all negative", "constant"]
)
def test_adversarial_orders(monkeypatch, kind, path):
    monkeypatch.setattr(tuning, "slab_shape", lambda rows, d_sae, nbytes: (rows, 1100))
    x, W, b = adversarial(kind)
    x = (x[:2] * 64).round() / 64  # constant latents then tie exactly, whatever the order of a sum
    for k in (1, 32):
        values, indices = run(x, W, b, k, path=path)
        assert_is_topk(values, indices, x, W, b, k)
        if kind in ("all negative", "constant"):
            assert torch.equal(indices, torch.arange(k, dtype=torch.int32).expand(2, k))


@pytest.mark.parametrize("activation", range(3))
def test_rows_that_overflow_are_done_over_and_counted(monkeypatch, small_chunks, activation):
    """64 groups and 64 places for k = 60: the bound of a chunk lets far more than the 4 free places through."""
    monkeypatch.setattr(tuning, "select_plan", lambda k: tuning.SELECT[64])
    x, W, b = small_integers(6, 9, 250, torch.float32)
    b = b + torch.arange(250) % 64  # no ties at the bound
    values, indices = x.new_empty(6, 60, device=DEVICE), torch.empty(6, 60, dtype=torch.int32, device=DEVICE)
    overflows = kernel.by_slabs(*on_device(x, W, b), 60, activation, None, values, indices)
    assert int(overflows) > 6
    assert_same((values.cpu(), indices.cpu()), reference.topk_encode(x, W, b, 60, ACTIVATIONS[activation]))


@pytest.mark.parametrize("activation", range(3))
@pytest.mark.parametrize("change", [{"room": 1}, {"rows": 3}, {"GROWTH": 4, "first_step": 16}])
def test_other_plans_of_the_fused_path(monkeypatch, change, activation):
    """No room for the groups: rows are done over and counted. Rows in several chunks. Phases that quadruple."""
    plan = dataclasses.replace(tuning.fused_plan(9, 1030, 5, 4), **change)
    monkeypatch.setattr(tuning, "fused_plan", lambda *shape: plan)
    x, W, b = small_integers(4, 9, 1030, torch.float32)
    b = b + torch.arange(1030) % 97 / 8
    values, indices = x.new_empty(4, 5, device=DEVICE), torch.empty(4, 5, dtype=torch.int32, device=DEVICE)
    overflows = fused.topk_encode_fused(*on_device(x, W, b), 5, activation, values, indices)
    assert int(overflows) >= 4 if "room" in change else int(overflows) <= 2
    assert_same((values.cpu(), indices.cpu()), reference.topk_encode(x, W, b, 5, ACTIVATIONS[activation]))


def test_the_path_by_the_weights():
    cases = {
        (256, 16384, 32, False): "fused", (512, 4096, 32, False): "fused", (513, 4096, 32, False): "slab",
        (256, 16384, 32, True): "slab", (64, 400, 32, False): "slab", (256, 16384, 342, False): "sort",
    }  # fmt: skip
    assert {shape: kernel.pick(*shape, torch.bfloat16) for shape in cases} == cases
    assert torch.get_float32_matmul_precision() == "highest"
    assert kernel.pick(256, 16384, 32, False, torch.float32) == "slab"
    torch.set_float32_matmul_precision("high")
    try:
        assert kernel.pick(256, 16384, 32, False, torch.float32) == "fused"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("d_sae", [600, 4096, 16384, 131072, 2**20])
def test_the_workspace_has_a_cap(d_sae):
    for k in (1, 22, 32, 85, 341):
        P = tuning.select_plan(k).P
        rows, columns = tuning.slab_shape(2**20, d_sae, tuning.slab_plan(2).nbytes)
        assert rows * (columns * 4 + P * 8 + 4) <= 160 * 2**20
        plan = tuning.fused_plan(256, d_sae, k, 2)
        slab = max(plan.head, -(-d_sae // plan.first_step)) * 4
        assert plan.rows * (slab + P * 8 + 8 + plan.room * 4 * (1 + 2**plan.LEVELS)) <= 160 * 2**20
        assert plan.rows >= 128 and plan.head >= 2 * k and P >= 3 * k
        if plan.first_step > 1:
            assert fused.phases(plan.first_step, plan.GROWTH)[-1] == 1


@pytest.mark.parametrize("activation", range(3))
def test_nan_and_inf(activation):
    x, W, b = small_integers(2, 9, 600, torch.float32)
    for fill in (torch.nan, torch.inf, -torch.inf):
        bias = b.clone()
        bias[::2] = fill
        for k, path in ((5, "slab"), (5, "fused"), (80, "sort")):
            assert_same(
                run(x, W, bias, k, activation, None, path),
                reference.topk_encode(x, W, bias, k, ACTIVATIONS[activation]),
            )
    x[0, 0] = torch.nan
    values, indices = run(x, W, b, 4, activation, path="fused")
    assert values[0].isnan().all() and indices[0].tolist() == [0, 1, 2, 3]


def test_no_competitor_and_minus_infinity():
    """A latent that may not compete stands behind one whose score is -inf."""
    x, W = torch.ones(2, 1), torch.full((6, 1), -torch.inf)
    mask = torch.tensor([False, False, True, False, True, False])
    values, indices = run(x, W, None, 4, topk_select.NONE, mask)
    assert indices.tolist() == [[2, 4, 0, 1]] * 2 and values.tolist() == [[-torch.inf, -torch.inf, 0, 0]] * 2
    values, indices = run(x, W, None, 3, topk_select.RELU, torch.zeros(6, dtype=torch.bool))
    assert indices.tolist() == [[0, 1, 2]] * 2 and not values.any()


def test_tritons_own_sort(monkeypatch):
    monkeypatch.setattr(tl, "sort", OWN_SORT)
    x, W, b = small_integers(3, 5, 70, torch.float32)
    assert_same(run(x, W, b, 3), reference.topk_encode(x, W, b, 3))


def test_public_function():
    """Shapes, strides, float64, empty input, and the backend that is asked for."""
    x, W, b = on_device(*small_integers(12, 10, 77, torch.float32))
    values, indices = sk.topk_encode(x, W, b, 6)
    with sk.backend("reference"):
        want = sk.topk_encode(x, W, b, 6)
    assert torch.equal(values, want[0]) and torch.equal(indices, want[1])
    got = sk.topk_encode(x.mT.contiguous().mT.view(3, 4, 10), W.mT.contiguous().mT, b.repeat_interleave(2)[::2], 6)
    assert torch.equal(got[0].view(12, 6), values) and torch.equal(got[1].view(12, 6), indices)
    wide = sk.topk_encode(x.double(), W.double(), b.double(), 6)
    assert wide[0].dtype == torch.float64 and torch.equal(wide[1], indices)
    empty = sk.topk_encode(x[:0], W, b, 6)
    assert empty[0].shape == empty[1].shape == (0, 6) and empty[1].dtype == torch.int32
    calls = []
    original = kernel.topk_encode
    kernel.topk_encode = lambda *a: calls.append(a) or original(*a)
    try:
        sk.topk_encode(x, W, b, 6)
        with sk.backend("reference"):
            sk.topk_encode(x, W, b, 6)
    finally:
        kernel.topk_encode = original
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_against_autograd_of_the_oracle(dtype):
    g = torch.Generator().manual_seed(1)
    x, W, b, grad = (torch.randn(*s, generator=g).to(DEVICE, dtype) for s in ((20, 20), (30, 20), (30,), (20, 8)))
    leaves = [t.clone().requires_grad_() for t in (x, W, b)]
    values, indices = sk.topk_encode(*leaves, 8)
    values.backward(grad)
    exact = [t.double().requires_grad_() for t in (x, W, b)]
    linear(*exact).relu().gather(-1, indices.long()).backward(grad.double())
    for got, want in zip(leaves, exact, strict=True):
        assert (got.grad.double() - want.grad).norm() < 4 * EPS[dtype] * want.grad.norm()
    again = [t.clone().requires_grad_() for t in (x, W, b)]
    sk.topk_encode(*again, 8)[0].backward(grad)
    assert all(torch.equal(a.grad, c.grad) for a, c in zip(leaves, again, strict=True))


def test_masked_and_zero_slots_pass_no_gradient():
    x, W, b = on_device(*small_integers(10, 6, 30, torch.float32))
    leaves = [t.clone().requires_grad_() for t in (x, W, b - 1000)]
    sk.topk_encode(*leaves, 5)[0].sum().backward()
    assert not any(t.grad.any() for t in leaves)
    mask = torch.arange(30, device=DEVICE) == 4
    leaves = [t.clone().requires_grad_() for t in (x, W, b)]
    sk.topk_encode(*leaves, 5, activation="none", latent_mask=mask)[0].sum().backward()
    assert leaves[2].grad.nonzero().flatten().tolist() == [4]


def test_registration_and_compile():
    x, W, b = on_device(*small_integers(9, 6, 30, torch.float32))
    torch.library.opcheck(torch.ops.sae_kernels.topk_encode_triton.default, (x[:2], W, b, 4, 0, None))
    grad, indices = torch.randn(3, 4, device=DEVICE), torch.zeros(3, 4, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(torch.ops.sae_kernels.topk_encode_triton_backward.default, (grad, indices, x[:3], 9))

    def loss(x, W, b):
        values, indices = sk.topk_encode(x, W, b, 4)
        return (sk.sparse_decode(values, indices, W) ** 2).sum()

    grads = []
    for f in (loss, torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, W, b)]
        f(*leaves).backward()
        grads.append([t.grad for t in leaves])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_autocast_selects_on_full_precision():
    g = torch.Generator().manual_seed(0)
    x, W = on_device(torch.randn(6, 32, generator=g), torch.randn(200, 32, generator=g))
    plain = sk.topk_encode(x, W, None, 8)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = sk.topk_encode(x, W, None, 8)
    assert torch.equal(got[0], plain[0]) and torch.equal(got[1], plain[1])


def test_the_number_of_rows_is_no_part_of_a_compile_key():
    select = topk_select.filter_slab, topk_select.rescan_slab, topk_select.rank, topk_select.write_keys
    for f in (*select, fused.filter_product):
        assert "rows" in (f.kwargs["do_not_specialize"] if INTERPRETED else f.do_not_specialize)


if DEVICE == "cuda":

    def test_more_than_2_to_31_pre_activations():
        rows, d_sae = 40_000, 60_000
        x = torch.linspace(-1, 1, rows, device=DEVICE)[:, None]
        W = torch.linspace(-1, 1, d_sae, device=DEVICE)[:, None]
        for path in ("fused", "slab"):
            values, indices = kernel.topk_encode(x, W, None, 1, topk_select.RELU, None, path)
            assert torch.equal(indices[:, 0], torch.where(x[:, 0] < 0, 0, d_sae - 1).to(torch.int32))
            assert torch.equal(values[:, 0], x[:, 0].abs())

    def test_a_step_in_a_cuda_graph():
        """Nothing in forward or backward waits for the host: a graph of them holds for other numbers."""
        g = torch.Generator(device=DEVICE).manual_seed(0)
        x, fresh = (torch.randn(300, 64, generator=g, device=DEVICE) for _ in range(2))
        W = torch.randn(2000, 64, generator=g, device=DEVICE).requires_grad_()

        def step():
            values, indices = sk.topk_encode(x, W, None, 16)
            y = sk.sparse_decode(values, indices, W)
            return y, torch.autograd.grad((y * y).sum(), W)[0]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        x.copy_(fresh)
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)


def test_the_fused_path_refuses_what_it_cannot_do():
    x, W, b = on_device(torch.ones(2, 4), torch.ones(20, 4), torch.zeros(20))
    with pytest.raises(ValueError, match="more than 20 latents for k = 8"):
        kernel.topk_encode(x, W, b, 8, 0, None, "fused")
    mask = torch.ones(1030, dtype=torch.bool, device=x.device)
    with pytest.raises(ValueError, match="takes no mask"):
        kernel.topk_encode(
            x, W[:1].expand(1030, 4).contiguous(), torch.zeros_like(mask, dtype=x.dtype), 4, 0, mask, "fused"
        )
