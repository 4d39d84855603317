"""The CUDA kernels of topk_encode against the fp64 oracle, on a GPU or, by tests/cuda_host, on the CPU."""

from functools import partial

import cuda_library
import pytest
import torch
from test_topk_encode import adversarial, assert_is_topk, small_integers

from sae_kernels.cuda import topk_encode as kernel
from sae_kernels.kernels import tuning
from sae_kernels.ops import reference
from sae_kernels.ops.topk_encode import ACTIVATIONS

encode, topk = (partial(cuda_library.call, f) for f in (kernel.topk_encode, kernel.topk))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def library():
    cuda_library.load()


def assert_same(got, want):
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0].double(), want[0].double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", range(3))
@pytest.mark.parametrize("d_sae", [417, 420])
def test_ties_index_for_index(d_sae, activation):
    """Rows read one by one and four by four; teams of a warp, of a block, and the sort of whole rows."""
    x, W, b = small_integers(3, 9, d_sae, torch.float32, seed=activation)
    mask = torch.rand(d_sae, generator=torch.Generator().manual_seed(1)) < 0.1
    for latent_mask in (None, mask):
        for k in (1, 100) if latent_mask is None else (33, 200):
            got = encode(x, W, b, k, activation, latent_mask)
            assert_same(got, reference.topk_encode(x, W, b, k, ACTIVATIONS[activation], latent_mask))


@pytest.mark.parametrize("activation", range(3))
def test_every_latent_and_more_than_the_buffers_hold(activation):
    x, W, b = small_integers(2, 9, 1100, torch.float32, seed=activation)
    mask = torch.arange(1100) % 7 == 3
    for k, latent_mask in ((1025, None), (1100, mask)):
        got = encode(x, W, b, k, activation, latent_mask)
        assert_same(got, reference.topk_encode(x, W, b, k, ACTIVATIONS[activation], latent_mask))


@pytest.mark.parametrize("activation", range(3))
def test_fewer_latents_compete_than_are_wanted(activation):
    """The first others fill up, once; those after them are out, though no score is."""
    x, W, b = small_integers(3, 8, 1500, torch.float32)
    b[700] = -torch.inf  # of all that compete the lowest
    mask = torch.zeros(1500, dtype=torch.bool)
    mask[[3, 700, 701, 1499]] = True
    for k in (30, 100):
        got = encode(x, W, b, k, activation, mask)
        assert_same(got, reference.topk_encode(x, W, b, k, ACTIVATIONS[activation], mask))


@pytest.mark.parametrize("activation", range(3))
def test_chunks_of_rows_and_latents(monkeypatch, activation):
    """Every row and every running list passes several; a first chunk has fewer latents than k."""
    monkeypatch.setattr(tuning, "slab_shape", lambda rows, d_sae, nbytes: (min(rows, 4), min(d_sae, 100)))
    x, W, b = small_integers(6, 9, 250, torch.float32)
    mask = torch.arange(250) % 7 == 3
    for k, latent_mask in ((1, None), (20, mask), (120, None)):
        got = encode(x, W, b, k, activation, latent_mask)
        assert_same(got, reference.topk_encode(x, W, b, k, ACTIVATIONS[activation], latent_mask))


@pytest.mark.parametrize("k", [33, 64, 150])
def test_chunks_that_together_have_fewer_than_k(monkeypatch, k):
    """What a chunk in the middle adds to too few is kept."""
    monkeypatch.setattr(tuning, "slab_shape", lambda rows, d_sae, nbytes: (min(rows, 4), min(d_sae, 7)))
    x, W, b = small_integers(3, 9, 200, torch.float32)
    for mask in (None, torch.arange(200) % 3 > 0):
        got = encode(x, W, b, k, 1, mask)
        assert_same(got, reference.topk_encode(x, W, b, k, "none", mask))


@pytest.mark.parametrize("dtype", DTYPES)
def test_random(dtype):
    g = torch.Generator().manual_seed(3)
    for d_in, d_sae, k in ((1, 40, 3), (37, 333, 32), (70, 700, 5)):
        x, W, b = (torch.randn(*s, generator=g).to(dtype) for s in ((4, d_in), (d_sae, d_in), (d_sae,)))
        for activation, name in enumerate(ACTIVATIONS):
            assert_is_topk(*encode(x, W, b, k, activation, None), x, W, b, k, name)


@pytest.mark.parametrize(
    "kind", ["ascending by column", "descending by column", "clustered", "all negative", "constant"]
)
def test_adversarial_orders(kind):
    x, W, b = adversarial(kind)
    x = (x[:2] * 64).round() / 64  # constant latents then tie exactly, whatever the order of a sum
    for k in (1, 32):
        values, indices = encode(x, W, b, k, 0, None)
        assert_is_topk(values, indices, x, W, b, k)
        if kind in ("all negative", "constant"):
            assert torch.equal(indices, torch.arange(k, dtype=torch.int32).expand(2, k))


def test_rows_that_overflow_are_trimmed_and_counted():
    """31 of the 128 groups hold all large scores, in ascending order, so the bound of k = 32 lets 496 through."""
    large = torch.arange(2048) % 128 < 31
    scores = torch.arange(2048.0) + torch.where(large, 1e4, 0.0)
    x, W, trims = (
        torch.eye(2),
        torch.stack([scores, scores.flip(0)], 1),
        torch.zeros(1, dtype=torch.int32, device=cuda_library.DEVICE),
    )
    assert_same(encode(x, W, None, 32, 1, None, trims), reference.topk_encode(x, W, None, 32, "none"))
    assert int(trims) == 2
    encode(x, torch.randn(2048, 2), None, 32, 0, None, trims)
    assert int(trims) == 2
    constant = encode(x, torch.ones(2048, 2), None, 200, 0, None, trims)  # every latent reaches the bound
    assert torch.equal(constant[1], torch.arange(200, dtype=torch.int32).expand(2, 200))
    assert int(trims) == 2  # the block's buffer holds them all


@pytest.mark.parametrize("activation", range(3))
def test_nan_infinity_and_signed_zero(activation):
    pre = torch.tensor([[0.0, -0.0, float("nan"), -1.0, float("inf"), -float("inf"), 2.0, -float("nan")]])
    W, x = pre.mT.contiguous(), torch.ones(1, 1)
    for k in (1, 4, 8):
        got = encode(x, W, None, k, activation, None)
        assert_same(got, reference.topk_encode(x, W, None, k, ACTIVATIONS[activation]))


def test_no_rows_and_inputs_that_are_not_contiguous():
    x, W, b = small_integers(8, 9, 120, torch.float32)
    values, indices = encode(x[:0], W, b, 5, 0, None)
    assert values.shape == indices.shape == (0, 5) and indices.dtype == torch.int32
    wide = torch.randn(120, 3)
    wide[:, 1] = b
    got = encode(x[::2], W.mT.contiguous().mT, wide[:, 1], 5, 0, torch.ones(240, dtype=torch.bool)[::2])
    assert_same(got, reference.topk_encode(x[::2], W, b, 5))


def test_topk_alone():
    scores = torch.randint(-9, 9, (3, 333), generator=torch.Generator().manual_seed(0)).float()
    for k in (7, 300):
        values, indices = topk(scores[:, 13:], k)  # rows that begin at odd places
        assert_same((values, indices), [t[:, :k] for t in scores[:, 13:].sort(dim=1, descending=True, stable=True)])
    for wrong, k, kind, message in (
        (scores.double(), 3, TypeError, "must be float32, got torch.float64"),
        (scores[0], 3, ValueError, r"must be \[N, d\] with contiguous rows, got \(333,\)"),
        (scores.mT, 3, ValueError, "with contiguous rows"),
        (scores, 334, ValueError, "k must be between 1 and 333, got 334"),
        (scores, 0, ValueError, "k must be between 1 and 333, got 0"),
    ):
        with pytest.raises(kind, match=message):
            kernel.topk(wrong, k)
