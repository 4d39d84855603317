"""The CUDA kernels of sparse_decode and of the sums per latent against the fp64 oracle, on a GPU or, by
tests/cuda_host, on the CPU.
"""

from functools import partial

import cuda_library
import pytest
import torch
from test_sparse_decode import DTYPES, case

from sae_kernels.cuda import sparse_decode as kernel
from sae_kernels.ops import reference

sparse_decode, grad_values, backward, latent_sums = (
    partial(cuda_library.call, f)
    for f in (kernel.sparse_decode, kernel.grad_values, kernel.backward, kernel.latent_sums)
)


@pytest.fixture(autouse=True, scope="module")
def library():
    cuda_library.load()


def assert_near(got, want, dtype):
    assert got.dtype == dtype and (got.double() - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()


def oracle_sums(indices, weights, rows, d_sae):
    codes = torch.zeros(len(rows), d_sae, dtype=torch.float64).scatter_add(1, indices.long(), weights.double())
    return codes.mT @ rows.double(), codes.sum(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 3, 50, 37), (9, 6, 20, 264), (5, 64, 300, 16)])
def test_forward(shape, dtype):
    """Rows of one element, odd rows, rows of several slices, many rows per block; int32 and int64 indices."""
    values, indices, W, b = case(*shape, dtype)
    want = reference.sparse_decode(values.double(), indices, W.double(), b.double())
    got = sparse_decode(values, indices, W, b)
    assert_near(got, want, dtype)
    assert torch.equal(sparse_decode(values, indices.long(), W, b), got)
    assert_near(sparse_decode(values, indices, W, None), want - b.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 3, 50, 37), (9, 6, 20, 264), (40, 5, 30, 16), (3, 2, 9, 1)])
def test_gradients(shape, dtype):
    """Dots in one pass with the sums (d of one slice) and on their own."""
    values, indices, W, _ = case(*shape, dtype)
    grad = torch.randn(shape[0], shape[3], generator=torch.Generator().manual_seed(9)).to(dtype)
    dots = (grad.double() @ W.double().mT).gather(1, indices.long())
    for index in (indices, indices.long()):
        dvalues, dW = backward(grad, values, index, W)
        assert_near(dvalues, dots, dtype)
        assert_near(dW, oracle_sums(indices, values, grad, len(W))[0], dtype)
    assert_near(grad_values(grad, indices, W), dots, dtype)


@pytest.mark.parametrize("chunk", [1, 3, 64, 1000])
@pytest.mark.parametrize("hot", [False, True])
def test_chunks(chunk, hot):
    """Runs that begin, end or lie across the ends of chunks; with `hot` one latent fires on every row."""
    weights, indices, _, _ = case(50, 4, 13, 8, torch.float32)
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    if hot:
        indices[:, 2] = 5
    sums, totals, dots = latent_sums(indices, weights, rows, 15, with_totals=True, chunk=chunk)
    want_sums, want_totals = oracle_sums(indices, weights, rows, 15)
    assert dots is None
    torch.testing.assert_close(sums.double(), want_sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(totals.double(), want_totals, rtol=1e-5, atol=1e-5)
    assert not sums[13:].any() and not totals[13:].any()
    again = latent_sums(indices, weights, rows, 15, with_totals=True, chunk=chunk)
    assert torch.equal(sums, again[0]) and torch.equal(totals, again[1])


@pytest.mark.parametrize("wrong", [-1, 20, 2**31 - 1, -(2**31), 2**40])
def test_an_index_out_of_range_is_not_followed_and_shows(wrong):
    values, indices, W, b = case(6, 3, 20, 8, torch.float32)
    bad = indices.long()
    bad[2, 1] = wrong
    bad = bad if wrong == 2**40 else bad.int()
    y = sparse_decode(values, bad, W, b)
    rest = torch.arange(6) != 2
    assert y[2].isnan().all()
    assert torch.equal(y[rest], sparse_decode(values, indices, W, b)[rest])
    grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    right = torch.ones(6, 3, dtype=torch.bool)
    right[2, 1] = False
    dvalues, dW = backward(grad, values, bad, W)
    for dots in (dvalues, grad_values(grad, bad, W)):
        assert torch.equal(dots.isnan(), ~right)
    want, _ = oracle_sums(indices, values * right, grad, 20)
    torch.testing.assert_close(dW.double(), want, rtol=1e-5, atol=1e-5)


def test_empty():
    values, indices, W, b = case(4, 3, 20, 8, torch.float32)
    assert sparse_decode(values[:0], indices[:0], W, b).shape == (0, 8)
    assert torch.equal(sparse_decode(values[:, :0], indices[:, :0], W, b), b.expand(4, 8))
    dvalues, dW = backward(torch.ones(0, 8), values[:0], indices[:0], W)
    assert dvalues.shape == (0, 3) and dW.shape == W.shape and not dW.any()
    assert sparse_decode(values, indices, W[:, :0], b[:0]).shape == (4, 0)


def test_views_at_odd_addresses_and_of_any_stride():
    values, indices, W, b = case(6, 3, 20, 8, torch.float32)
    grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))

    def shifted(t):
        return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)

    got = sparse_decode(values.mT.contiguous().mT, indices, shifted(W), shifted(b))
    torch.testing.assert_close(got, sparse_decode(values, indices, W, b))
    for a, e in zip(
        backward(shifted(grad), values, indices, shifted(W)),
        backward(grad, values, indices, W),
        strict=True,
    ):
        torch.testing.assert_close(a, e)
