"""sae_loss, and the loss through an encoder, against autograd on the fp64 oracle."""

import sys

import pytest
import torch
from test_sparse_decode import DTYPES, case

import sae_kernels as sk
from sae_kernels.ops.sae_loss import autoencoder_loss

module = sys.modules["sae_kernels.ops.sae_loss"]  # the package's attribute of that name is the function
SHAPES = [(1, 1, 1, 1), (7, 3, 50, 37), (60, 20, 90, 130), (33, 64, 2000, 300), (40, 5, 20, 64)]


def problem(rows, k, d_sae, d, dtype=torch.float64, seed=0):
    """A code, its decoder and x; the code of slot 0 is 0 in every third row."""
    values, indices, W, b = case(rows, k, d_sae, d, dtype, seed)
    values[::3, 0] = 0
    x = torch.randn(rows, d, generator=torch.Generator().manual_seed(seed + 5)).to(dtype)
    return x, values, indices, W, b


def dense_errors(x, values, indices, W, b, prefixes):
    """|decoded - x|^2 of every prefix, in plain differentiable torch."""
    rows = [(values[:, :end, None] * W[indices[:, :end].long()]).sum(1) for end in prefixes]
    return torch.stack([((r if b is None else r + b) - x).square().sum(-1) for r in rows], 1)


def gradients(errors, leaves, weight):
    return torch.autograd.grad((errors * weight).sum(), leaves, allow_unused=True)


def close(got, want, dtype):
    """Narrow types: the rounding of the residual and of the result. Wide ones: of sums over many entries."""
    factor = 4 if dtype in (torch.bfloat16, torch.float16) else 32
    for a, e in zip(got, want, strict=True):
        assert a.dtype == dtype and a.shape == e.shape
        assert (a.double() - e).norm() <= factor * torch.finfo(dtype).eps * max(e.norm(), 1e-30)


def weights(rows, prefixes):
    return torch.rand(rows, len(prefixes), generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 64 + 0.01


def test_by_hand():
    x, W = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, -1.0]])
    values, indices = torch.tensor([[2.0, 1.0]]), torch.tensor([[0, 2]])
    errors, residual = sk.sae_loss(x, values, indices, W)  # 2 (1, 0) + (3, -1) = (5, -1)
    assert errors.tolist() == [25] and residual.tolist() == [[4, -3]]
    nested = sk.sae_loss(x, values, indices, W, torch.tensor([0.0, 1.0]), prefixes=[1, 2])
    assert nested.errors.tolist() == [[2, 20]] and nested.total.tolist() == [2, 20]  # (2, 1) and (5, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_oracle(isa, shape, dtype):
    check_against_the_oracle(shape, dtype)


def check_against_the_oracle(shape, dtype, device="cpu"):
    tensors = [t.to(device) for t in problem(*shape, dtype)]
    rows, k = shape[0], shape[1]
    for prefixes in ([k], sorted({max(1, k // 4), max(1, k // 2), k})):
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
        exact = [t.double().requires_grad_() if t.is_floating_point() else t for t in tensors]
        errors, residual = sk.sae_loss(*leaves, prefixes=prefixes)
        want = dense_errors(*exact, prefixes)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        close([errors], [want.detach()], acc)
        last = dense_errors(*exact, [k])[:, 0].detach()
        torch.testing.assert_close(
            residual.double().square().sum(-1), last, rtol=8 * torch.finfo(dtype).eps, atol=1e-12
        )
        wanted = [leaves[i] for i in (0, 1, 3, 4)]
        weight = weights(rows, prefixes).to(device)
        close(
            gradients(errors, wanted, weight.to(errors.dtype)),
            gradients(want, [exact[i] for i in (0, 1, 3, 4)], weight),
            dtype,
        )


def affine(x, W_enc, b_enc, b_dec, indices):
    return ((x - b_dec)[:, None] * W_enc[indices.long()]).sum(-1) + b_enc[indices.long()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_through_the_encoder(isa, shape, dtype):
    check_through_the_encoder(shape, dtype)


def check_through_the_encoder(shape, dtype, device="cpu"):
    """Gradients of every parameter, of the returned values too, with slots of 0 that pass none under relu."""
    x, values, indices, W_dec, b_dec = (t.to(device) for t in problem(*shape, dtype))
    rows, k, d_sae, d = shape
    generator = torch.Generator().manual_seed(11)
    W_enc, b_enc = (torch.randn(*s, generator=generator).to(device, dtype) for s in ((d_sae, d), (d_sae,)))
    parameters = [W_enc, b_enc, W_dec, b_dec]
    for prefixes in ([k], sorted({max(1, k // 3), k})):
        for relu in (True, False):
            leaves = [t.clone().requires_grad_() for t in parameters]
            exact = [t.double().requires_grad_() for t in parameters]
            (errors, _), code = autoencoder_loss(x, values, indices, *leaves, relu=relu, prefixes=prefixes)
            assert torch.equal(code, values) and code.requires_grad
            pre = affine(x.double(), exact[0], exact[1], exact[3], indices)
            # the encoder's gradient, at the values that were given
            pre = values.double() + (torch.where(values == 0, pre.detach(), pre) if relu else pre) - pre.detach()
            want = dense_errors(x.double(), pre, indices, exact[2], exact[3], prefixes)
            weight = weights(rows, prefixes).to(device)
            ours = (errors * weight.to(errors.dtype)).sum() + 3 * code.sum()
            theirs = (want * weight).sum() + 3 * pre.sum()
            close(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, exact), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_far_from_the_origin(dtype):
    check_far_from_the_origin(dtype)


def check_far_from_the_origin(dtype, device="cpu"):
    """With x - b_dec at hand W_enc's gradient is as exact as its dtype. Returns by how much better than without."""
    x, values, indices, W_dec, b_dec = (t.to(device) for t in problem(50, 4, 20, 24, dtype))
    x, b_dec = (4 * x).round() + 128, torch.full_like(b_dec, 128)  # whole numbers: no rounding in x - b_dec
    W_enc, b_enc = torch.zeros_like(W_dec), torch.zeros(20, dtype=dtype, device=device)

    def gradient(x, values, *parameters, **options):
        leaves = [t.clone().requires_grad_() for t in parameters]
        errors, _ = autoencoder_loss(x, values, indices, *leaves, **options)
        return torch.autograd.grad(errors.total / 16, leaves[0])[0].double()

    exact = gradient(x.double(), values.double(), *(t.double() for t in (W_enc, b_enc, W_dec, b_dec)))
    off = [(gradient(x, values, W_enc, b_enc, W_dec, b_dec, centred=c) - exact).norm() for c in (x - b_dec, None)]
    assert off[0] <= 4 * torch.finfo(dtype).eps * exact.norm()
    return off[1] / off[0]


def test_values_alone_or_errors_alone_reach_the_encoder():
    x, values, indices, W_dec, b_dec = problem(9, 4, 30, 10)
    W_enc, b_enc = torch.randn(30, 10).double().requires_grad_(), torch.zeros(30).double().requires_grad_()
    for part in (0, 1):
        error, code = autoencoder_loss(x, values, indices, W_enc, b_enc, W_dec, b_dec)
        got = torch.autograd.grad((error.errors, code)[part].sum(), b_enc)[0]
        sent = torch.ones(9, 4).double() if part else 2 * (error.residual @ W_dec.mT).gather(1, indices.long())
        want = torch.zeros(30).double().index_add(0, indices.reshape(-1), torch.where(values == 0, 0, sent).reshape(-1))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_go_block_by_block(dtype):
    """More rows than one block: sums meet in the output, or in float32 where that is narrow."""
    check_through_the_encoder((20000, 2, 30, 20), dtype)


def test_gradients_agree_with_sparse_decode(isa):
    x, values, indices, W, b = problem(60, 6, 40, 70, torch.float32)
    leaves = [t.clone().requires_grad_() for t in (values, W, b)]
    got = torch.autograd.grad(sk.sae_loss(x, leaves[0], indices, *leaves[1:]).total, leaves)
    y = sk.sparse_decode(leaves[0], indices, *leaves[1:])
    want = torch.autograd.grad((y - x).square().sum(), leaves)
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    x, values, indices, W, b = problem(5, 3, 12, 7)
    with sk.backend(backend):
        inputs = [t.requires_grad_() for t in (x, values, W, b)]
        for prefixes in (None, [1, 3]):
            assert torch.autograd.gradcheck(
                lambda x, v, w, c, p=prefixes: sk.sae_loss(x, v, indices, w, c, prefixes=p).errors, inputs
            )


def test_shapes_strides_and_grad_mode():
    x, values, indices, W, b = problem(60, 4, 30, 10, torch.float32)
    errors, residual = sk.sae_loss(x, values, indices, W, b)
    assert errors.shape == (60,) and residual.shape == (60, 10) and not residual.requires_grad
    shaped = sk.sae_loss(x.view(3, 20, 10), values.view(3, 20, 4), indices.view(3, 20, 4), W, b, prefixes=[2, 4])
    assert shaped.errors.shape == (3, 20, 2) and shaped.total.shape == (2,)
    assert torch.equal(shaped.errors[..., 1].reshape(60), errors) and torch.equal(
        shaped.residual.view(60, 10), residual
    )
    columns = [t.mT.contiguous().mT for t in (x, values, indices, W)]
    assert torch.equal(sk.sae_loss(*columns, b).errors, errors)
    assert torch.equal(sk.sae_loss(x, values, indices.long(), W, b).errors, errors)
    assert sk.sae_loss(x[0], values[0], indices[0], W, b).errors.shape == ()
    W.requires_grad_()
    empty = sk.sae_loss(x[:0], values[:0], indices[:0], W, b, prefixes=[1, 4])
    assert empty.errors.shape == (0, 2)
    assert not torch.autograd.grad(empty.errors.sum(), W)[0].any()


def test_a_backend_without_its_kernels(monkeypatch):
    """There it is composed of sparse_decode: the same numbers and gradients."""
    x, values, indices, W, b = problem(20, 4, 30, 10)
    W.requires_grad_()
    for prefixes in (None, [1, 4]):
        want = sk.sae_loss(x, values, indices, W, b, prefixes=prefixes)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_forward", {})
            assert not module.has_autoencoder_loss(x.device)
            got = sk.sae_loss(x, values, indices, W, b, prefixes=prefixes)
        assert module.has_autoencoder_loss(x.device)
        torch.testing.assert_close(got.errors, want.errors)
        torch.testing.assert_close(got.residual, want.residual)
        grads = [torch.autograd.grad(e.total.sum(), W) for e in (got, want)]
        torch.testing.assert_close(*grads)


def test_nan_and_infinity_stay_in_their_row():
    x, values, indices, W, b = problem(6, 3, 20, 40, torch.float32)
    values[2, 1], values[4, 0] = float("nan"), float("inf")
    errors = sk.sae_loss(x, values, indices, W, b).errors
    assert errors[2].isnan() and not errors[4].isfinite() and errors[[0, 1, 3, 5]].isfinite().all()


def test_bits_do_not_depend_on_threads(threads):
    x, values, indices, W, b = problem(9000, 6, 300, 70, torch.float32)
    indices[:, 0] = 5
    runs = []
    for n in (1, 2, 5):
        threads(n)
        leaves = [t.clone().requires_grad_() for t in (values, W, b)]
        errors, residual = sk.sae_loss(x, leaves[0], indices, *leaves[1:], prefixes=[2, 6])
        runs.append([errors, residual, *torch.autograd.grad(errors.sum(), leaves)])
    for other in runs[1:]:
        assert all(torch.equal(a, c) for a, c in zip(runs[0], other, strict=True))


def test_registration():
    for dtype in (torch.float32, torch.float16):
        x, values, indices, W, b = problem(9, 4, 30, 10, dtype)
        ops, grad_errors = torch.ops.sae_kernels, torch.rand(9, 2)
        torch.library.opcheck(ops.sae_loss.default, (x, values, indices, W, b, [1, 4]))
        torch.library.opcheck(ops.sae_loss_prefix_grads.default, (grad_errors, x, values, indices, W, [1, 4]))
        rows, tail = x.unsqueeze(1).expand(9, 2, 10), ([1, 4], x, b, values, True)
        torch.library.opcheck(ops.sae_loss_backward.default, (rows, grad_errors[:, 0], values, indices, W, *tail))
        alone = (x.unsqueeze(1), None, values, indices.long(), W, [4], None, None, None, False)
        torch.library.opcheck(ops.sae_loss_backward.default, alone)


def test_compiled():
    x, values, indices, W, b = problem(9, 4, 30, 10, torch.float32)
    W.requires_grad_()

    def loss(x, values, indices):
        return sk.sae_loss(x, values, indices, W, b, prefixes=[2, 4]).total.sum()

    compiled = torch.compile(loss, fullgraph=True)
    got, want = compiled(x, values, indices), loss(x, values, indices)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, W), torch.autograd.grad(want, W))


def test_bad_input():
    x, values, indices, W, b = problem(9, 4, 30, 10, torch.float32)
    cases = [
        (ValueError, r"sae_loss: x \(9, 9\) must be \(9, 10\)", (x[:, 1:], values, indices, W, b), {}),
        (ValueError, r"sae_loss: values \(9, 3\) and indices", (x, values[:, 1:], indices, W, b), {}),
        (TypeError, "sae_loss: x must be a tensor, got int", (3, values, indices, W, b), {}),
        (TypeError, "x is torch.float64 and W_dec is torch.float32", (x.double(), values, indices, W, b), {}),
        (ValueError, r"ascend and end with k = 4, got \[2, 3\]", (x, values, indices, W, b), {"prefixes": [2, 3]}),
        (ValueError, r"ascend and end with k = 4, got \[4, 4\]", (x, values, indices, W, b), {"prefixes": [4, 4]}),
        (ValueError, r"ascend and end with k = 4, got \[\]", (x, values, indices, W, b), {"prefixes": []}),
        (ValueError, "prefixes must be between 1 and 4, got 0", (x, values, indices, W, b), {"prefixes": [0, 4]}),
        (TypeError, "prefixes must be an int, got float", (x, values, indices, W, b), {"prefixes": [1.0, 4]}),
        (ValueError, r"indices must be in \[0, d_sae = 30\)", (x, values, indices + 30, W, b), {}),
    ]
    for error, message, args, options in cases:
        with pytest.raises(error, match=message):
            sk.sae_loss(*args, **options)
