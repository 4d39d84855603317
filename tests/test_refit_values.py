"""refit_values: every backend and instruction set against least squares in float64, and where it stops."""

import pytest
import torch

import sae_kernels as sk
from sae_kernels import _native
from sae_kernels.ops.refit_values import refit_values
from sae_kernels.ops.sparse_decode import code_products, sparse_decode

needs_library = pytest.mark.skipif(not _native.cpu_loaded(), reason=f"the native library is {_native.cpu_error}")
BACKENDS = [pytest.param("cpu", marks=needs_library), "reference"]


def problem(n, d, d_sae, k, dtype=torch.float64, seed=0):
    """Rows, a code of distinct latents whose last slot is 0 in every other row, and a decoder."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(d_sae, d, generator=g, dtype=torch.float64).to(dtype)
    indices = torch.rand(n, d_sae, generator=g).argsort(dim=1)[:, :k].int()
    values = torch.rand(n, k, generator=g, dtype=torch.float64).to(dtype) + 0.5
    values[::2, -1] = 0
    return torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype), values, indices, W


def least_squares(x, values, indices, W):
    found = torch.zeros(values.shape, dtype=torch.float64)
    for row in range(len(x)):
        free = values[row] != 0
        chosen = W.double()[indices[row, free].long()]
        found[row, free] = torch.linalg.lstsq(chosen.T, x[row].double().unsqueeze(1)).solution.squeeze(1)
    return found


def squared_error(x, values, indices, W):
    return (sparse_decode(values.double(), indices, W.double()) - x.double()).square().sum(1)


SHAPES = [(9, 1, 5, 1), (6, 7, 20, 3), (5, 40, 64, 8), (4, 130, 40, 17), (3, 600, 90, 33)]


@pytest.mark.parametrize("shape", SHAPES)
def test_k_steps_are_least_squares(shape, isa):
    given = problem(*shape)
    for backend in ("cpu", "reference"):
        with sk.backend(backend):
            found = refit_values(*given, steps=3 * shape[-1])
        torch.testing.assert_close(found, least_squares(*given), rtol=1e-5, atol=1e-6)
        assert (found[::2, -1] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, share", [(torch.float32, 1e-5), (torch.bfloat16, 0.01), (torch.float16, 1e-3)])
def test_narrow_types_come_as_close(dtype, share, backend):
    """What float64 gains in 4 steps from the same code on, but for a share of it."""
    x, values, indices, W = problem(40, 72, 96, 12, dtype)
    with sk.backend(backend):
        found = refit_values(x, values, indices, W, 4)
        exact = refit_values(x.double(), values.double(), indices, W.double(), 4)
    assert found.dtype == dtype
    start, wanted, error = (squared_error(x, v, indices, W).sum() for v in (values, exact, found))
    assert wanted < 0.9 * start and abs(error - wanted) < share * (start - wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_step_comes_closer_in_every_row(backend):
    given = problem(30, 24, 60, 6)
    with sk.backend(backend):
        errors = [squared_error(given[0], refit_values(*given, steps), *given[2:]) for steps in range(7)]
        assert torch.equal(refit_values(*given, 0), given[1])
    for before, after in zip(errors, errors[1:], strict=False):
        assert (after <= before * (1 + 1e-12)).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_steps_than_there_is_to_gain_do_no_harm(backend, dtype):
    x, values, indices, W = problem(30, 24, 60, 6, dtype)
    fit = least_squares(x, values, indices, W)
    made = sparse_decode(values, indices, W)
    with sk.backend(backend):
        torch.testing.assert_close(refit_values(x, values, indices, W, 500).double(), fit, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(refit_values(made, values, indices, W, 500), values)
        nothing = refit_values(x, torch.zeros_like(values), indices, W, 3)
    assert (nothing == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_latents_share(backend):
    x, values, indices, W = problem(5, 16, 30, 4)
    W[:] = W[:1]
    with sk.backend(backend):
        found = refit_values(x, values, indices, W, 5)
    best = (x @ W[0] / W[0].square().sum()).unsqueeze(1) * W[0]
    torch.testing.assert_close(sparse_decode(found, indices, W), best)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row_and_no_rows_are_none(backend):
    x, values, indices, W = problem(5, 16, 30, 4)
    with sk.backend(backend):
        wanted = refit_values(x, values, indices, W, 3)
        x[1, 2] = torch.nan
        found = refit_values(x, values, indices.long(), W, 3)
        assert refit_values(x[:0], values[:0], indices[:0], W, 3).shape == (0, 4)
    keep = torch.arange(5) != 1
    assert torch.equal(found[keep], wanted[keep]) and found[1][values[1] != 0].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_index_out_of_range_is_refused(backend):
    x, values, indices, W = problem(5, 16, 30, 4)
    for bad in (-1, 30):
        indices[3, 1] = bad
        with sk.backend(backend), pytest.raises(ValueError, match=r"indices must be in \[0, d_sae = 30\), got"):
            refit_values(x, values, indices, W, 3)


@needs_library
def test_threads_change_no_bit():
    given, threads = problem(200, 64, 128, 16, torch.float32), torch.get_num_threads()
    found = []
    for n in (1, 3):
        torch.set_num_threads(n)
        found.append(refit_values(*given, 4))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_are_the_gradient_of_the_values(backend):
    x, _, indices, W = problem(7, 24, 80, 5)
    with sk.backend(backend):
        torch.testing.assert_close(code_products(x, indices, W), (x @ W.T).gather(1, indices.long()))
        with pytest.raises(ValueError, match="indices must be in"):
            code_products(x, indices + 80, W)
