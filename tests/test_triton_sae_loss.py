"""The Triton kernels of sae_loss against autograd on the fp64 oracle, on a GPU or in the interpreter."""

import pytest
import torch
from triton_interpreter import DEVICE, need_a_place_to_run

need_a_place_to_run()

from test_sae_loss import (  # noqa: E402
    check_against_the_oracle,
    check_far_from_the_origin,
    check_through_the_encoder,
    problem,
)
from test_sparse_decode import DTYPES  # noqa: E402

import sae_kernels as sk  # noqa: E402
from sae_kernels.kernels import sae_loss as kernel  # noqa: E402
from sae_kernels.kernels import tuning  # noqa: E402
from sae_kernels.ops.sae_loss import autoencoder_loss  # noqa: E402


@pytest.fixture(autouse=True)
def on_triton():
    with sk.backend("triton"):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 3, 8, 37)])
def test_against_the_oracle(shape, dtype):
    check_against_the_oracle(shape, dtype, DEVICE)


@pytest.mark.parametrize(
    ("dtype", "one_program"), [*((dtype, True) for dtype in DTYPES), (torch.float32, False), (torch.bfloat16, False)]
)
def test_through_the_encoder(dtype, one_program, monkeypatch):
    """All gradients from one kernel, and in turn where rows are too long for one program."""
    if not one_program:
        monkeypatch.setattr(tuning, "widest_row", lambda element_size: 32)
    check_through_the_encoder((4, 3, 8, 37), dtype, DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_far_from_the_origin(dtype):
    assert check_far_from_the_origin(dtype, DEVICE) > 4  # without it, a difference of two rounded numbers


@pytest.mark.parametrize(("rows", "budgets", "d"), [(1, 1, 5), (513, 1, 40), (1100, 3, 300)])
def test_what_is_added_to_every_row(rows, budgets, d):
    """Its gradient: the rows of the first budget, of one program's share and of several."""
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(rows, budgets, d, generator=generator).to(DEVICE, torch.bfloat16)
    scale = torch.rand(rows, generator=generator).to(DEVICE)
    for weights in (scale, None):
        exact = (grad[:, 0].double() * (1 if weights is None else weights.double()[:, None])).sum(0)
        torch.testing.assert_close(kernel._summed(grad, weights).double(), exact, rtol=1e-5, atol=1e-4)


def test_latents_in_many_chunks(monkeypatch):
    """A latent that fires on every row is summed in chunks, in a fixed order."""
    monkeypatch.setattr(tuning, "chunk_length", lambda *sizes: 5)
    x, values, indices, W_dec, b_dec = (t.to(DEVICE) for t in problem(40, 2, 9, 24, torch.float32))
    indices[:, 0] = 7
    W_enc, b_enc = torch.randn(9, 24, device=DEVICE), torch.zeros(9, device=DEVICE)

    def grads():
        leaves = [t.clone().requires_grad_() for t in (W_enc, b_enc, W_dec, b_dec)]
        error, _ = autoencoder_loss(x, values, indices, *leaves, prefixes=[1, 2])
        return torch.autograd.grad(error.total.sum(), leaves)

    chunked = grads()
    assert all(torch.equal(a, b) for a, b in zip(chunked, grads(), strict=True))
    monkeypatch.undo()
    with sk.backend("reference"):
        want = grads()
    for a, e in zip(chunked, want, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * e.abs().max().item())


def test_an_index_out_of_range_spoils_its_row_alone():
    x, values, indices, W, b = (t.to(DEVICE) for t in problem(9, 4, 30, 10, torch.float32))
    indices[8, 3] = 30
    W.requires_grad_()
    errors, _ = sk.sae_loss(x, values, indices, W, b)
    assert errors[8].isnan() and errors[:8].isfinite().all()
    elsewhere = torch.ones(30, dtype=torch.bool, device=DEVICE)
    elsewhere[indices[8, :3].long()] = False  # the latents that share the row
    dW = torch.autograd.grad(errors.sum(), W)[0]
    assert dW[elsewhere].isfinite().all() and dW[~elsewhere].isnan().any()


def test_no_rows():
    x, values, indices, W, b = (t.to(DEVICE) for t in problem(0, 4, 9, 10, torch.float32))
    W.requires_grad_()
    errors, residual = sk.sae_loss(x, values, indices, W, b, prefixes=[1, 4])
    assert errors.shape == (0, 2) and residual.shape == (0, 10)
    assert not torch.autograd.grad(errors.sum(), W)[0].any()


def test_registration():
    x, values, indices, W, b = (t.to(DEVICE) for t in problem(3, 4, 9, 10, torch.float32))
    ops, grad_errors = torch.ops.sae_kernels, torch.rand(3, 2, device=DEVICE)
    torch.library.opcheck(ops.sae_loss_triton.default, (x, values, indices, W, b, [1, 4]))
    torch.library.opcheck(ops.sae_loss_triton_prefix_grads.default, (grad_errors, x, values, indices, W, [1, 4]))
    rows, tail = x.unsqueeze(1).expand(3, 2, 10), ([1, 4], x, b, values, True)
    scale = grad_errors[:, 0].contiguous()
    torch.library.opcheck(ops.sae_loss_triton_backward.default, (rows, scale, values, indices, W, *tail))
