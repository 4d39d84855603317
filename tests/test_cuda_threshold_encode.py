"""threshold_encode and batch_topk_encode on the CUDA kernels against the oracle, on a GPU or, by tests/cuda_host, on
the CPU.
"""

import cuda_library
import pytest
import test_batch_topk_encode as batch
import torch
from cuda_library import DEVICE
from test_threshold_encode import assert_same, oracle
from test_topk_encode import small_integers

import sae_kernels as sk
from sae_kernels.cuda import threshold_encode as kernel
from sae_kernels.kernels import tuning
from sae_kernels.ops.topk_encode import ACTIVATIONS


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch):
    cuda_library.load()
    if DEVICE == "cpu":
        cuda_library.pretend(monkeypatch)
    with sk.backend("cuda"):
        yield


def run(x, W, b, threshold, max_active, activation="relu", mask=None):
    x, W, b, mask = (None if t is None else t.to(DEVICE) for t in (x, W, b, mask))
    threshold = threshold.to(DEVICE) if isinstance(threshold, torch.Tensor) else threshold
    got = sk.threshold_encode(x, W, b, threshold, max_active=max_active, activation=activation, latent_mask=mask)
    return [t.cpu() for t in got]


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [*((name, torch.float32) for name in ACTIVATIONS), ("relu", torch.bfloat16), ("abs", torch.float16)],
)
def test_exact_arithmetic_entry_for_entry(activation, dtype):
    """Thresholds for all latents and for each, with and without a mask; buffers of all sizes; no slot left and many."""
    x, W, b = small_integers(2, 9, 417, dtype)
    g = torch.Generator().manual_seed(1)
    mask, each = torch.rand(417, generator=g) < 0.4, torch.randint(-8, 25, (417,), generator=g).float()
    for latent_mask, threshold, max_active in (
        (None, 6.0, 9),
        (mask, each, 40),
        (None, each, 400),
        (mask, 99.0, 3),
        (None, 2.0, 90),
        (mask, 1.0, 256),
    ):
        got = run(x, W, b, threshold, max_active, activation, latent_mask)
        assert got[0].dtype == dtype
        assert_same(got, oracle(x, W, b, threshold, max_active, activation, latent_mask))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_chunks_of_rows_and_latents_and_the_sort_of_whole_rows(monkeypatch, activation):
    x, W, b = small_integers(2, 9, 1100, torch.float32)
    mask = torch.arange(1100) % 7 > 0
    assert_same(run(x, W, b, 3.0, 1030, activation, mask), oracle(x, W, b, 3.0, 1030, activation, mask))
    monkeypatch.setattr(tuning, "slab_shape", lambda rows, d_sae, nbytes: (min(rows, 4), min(d_sae, 100)))
    x, W, b = small_integers(6, 9, 250, torch.float32)
    each = torch.arange(250.0) % 13
    for threshold, max_active in ((each, 20), (-torch.inf, 100)):
        assert_same(run(x, W, b, threshold, max_active, activation), oracle(x, W, b, threshold, max_active, activation))


def orders(d_sae):
    """[d_sae] scores above 0 whose order fills a buffer again and again, or whose ties must be settled."""
    g = torch.Generator().manual_seed(2)
    yield torch.arange(1.0, d_sae + 1)
    yield torch.arange(d_sae, 0.0, -1)
    yield torch.randn(d_sae, generator=g).exp()
    yield torch.full((d_sae,), 3.0)
    yield torch.randint(1, 4, (d_sae,), generator=g).float()
    yield torch.where(torch.rand(d_sae, generator=g) < 0.2, torch.nan, torch.arange(1.0, d_sae + 1))


@pytest.mark.parametrize("max_active, columns", [(9, 3000), (100, 1000), (200, 999), (600, 3000), (600, 999)])
def test_buffers_that_fill_up(monkeypatch, max_active, columns):
    """Latents four by four and one by one, whole rows and chunk after chunk, whose results are cut and cut again."""
    monkeypatch.setattr(tuning, "slab_shape", lambda rows, d_sae, nbytes: (rows, columns))
    x = torch.tensor([[1.0], [-1.0]])  # the second row: only where the sign does not matter
    each, mask = torch.arange(3000.0) % 5 / 2, torch.arange(3000) % 11 > 0
    for scores in orders(3000):
        W = scores.unsqueeze(1)
        for activation, threshold, latent_mask in (
            ("abs", 0.0, None),
            ("none", -torch.inf, mask),
            ("relu", each, None),
        ):
            got = run(x, W, None, threshold, max_active, activation, latent_mask)
            assert_same(got, oracle(x, W, None, threshold, max_active, activation, latent_mask))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf(activation):
    x, W, b = small_integers(2, 9, 152, torch.float32)
    for fill in (torch.nan, torch.inf, -torch.inf):
        bias = b.clone()
        bias[::5] = fill
        assert_same(run(x, W, bias, 3.0, 60, activation), oracle(x, W, bias, 3.0, 60, activation))


def test_float64_empties_and_the_whole_batch():
    x, W, b = small_integers(12, 10, 77, torch.float32)
    assert run(x[:0], W, b, 1.0, 6)[0].shape == (0, 6)
    assert_same(run(x.double(), W.double(), b.double(), 2.0, 6), oracle(x, W, b, 2.0, 6))
    got = [t.cpu() for t in sk.batch_topk_encode(*(t.to(DEVICE) for t in (x, W, b)), 4)]
    with sk.backend("reference"):
        want = sk.batch_topk_encode(x, W, b, 4)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("case", "again"), [("as sampled", 0), ("strong rows sampled", 1), ("few fire", 0), ("equal", 1), ("nan", None)]
)
def test_the_batch_by_a_guess(monkeypatch, case, again, activation):
    """Right whether or not the guess lets enough pass; the kernel that repeats it runs only where it must."""
    told, choose = [], kernel.choose
    monkeypatch.setattr(kernel, "choose", lambda *a: told.append(a[10:]) or choose(*a))
    monkeypatch.setattr(batch.module, "_SAMPLE_ON_GPU", 16)
    monkeypatch.setattr(batch.module, "_FEWEST_ON_GPU", 32)
    x, W, b = small_integers(70, 6, 200, torch.bfloat16)
    if case == "strong rows sampled":
        x[::5] *= 8
    elif case == "few fire":
        b = b - 40
    elif case == "equal":
        x, W, b = torch.ones_like(x), torch.ones_like(W), torch.zeros_like(b)
    elif case == "nan":
        x[::5, 0] = torch.nan
    got = [t.cpu() for t in sk.batch_topk_encode(*(t.to(DEVICE) for t in (x, W, b)), 4, activation=activation)]
    batch.assert_same(got, batch.oracle(x, W, b, 4, 16, activation), 200)
    first, second = told
    assert first == () and second[0].shape == (1,)
    if activation == "relu" and again is not None:
        assert second[0].item() == again * len(x)


def test_only_the_fused_kernel_can_be_left_out():
    x, W, b = (t.to(DEVICE) for t in small_integers(4, 6, 40, torch.float32))
    assert not kernel.takes_twice(x, W, 9, 0, None)
    limits = [torch.full((1,), float(t), device=DEVICE) for t in (9, 0)]
    with pytest.raises(RuntimeError, match="which alone can be left out"):
        kernel.threshold_encode_twice(x, W, b, *limits, 8, 9, 0)


def test_the_guess_asks_the_device_for_nothing(monkeypatch):
    """Every way from a tensor to a Python number is closed while the batch is encoded."""
    monkeypatch.setattr(batch.module, "_FEWEST_ON_GPU", 512)
    x, W, b = (t.to(DEVICE) for t in small_integers(512, 6, 70, torch.bfloat16))
    with monkeypatch.context() as watched:
        for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "__index__", "__float__", "cpu", "numpy"):
            watched.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
        counts = sk.batch_topk_encode(x, W, b, 4)[2]
    assert counts.sum() == 4 * 512
