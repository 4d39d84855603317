"""sparse_decode and its gradients against the fp64 oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae_kernels as sk
from sae_kernels.ops import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def case(rows, k, d_sae, d_out, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    values, W, b = (torch.randn(*s, generator=g).to(dtype) for s in ((rows, k), (d_sae, d_out), (d_out,)))
    return values, torch.randint(0, d_sae, (rows, k), generator=g, dtype=torch.int32), W, b


def gradients(values, indices, W, b, grad):
    leaves = [t.clone().requires_grad_() for t in (values, W, b)]
    y = sk.sparse_decode(leaves[0], indices, *leaves[1:])
    y.backward(grad)
    return [y.detach(), *(t.grad for t in leaves)]


def test_by_hand():
    values = torch.tensor([[2.0, 1.0], [0.0, -1.0], [1.0, 1.0]])
    indices = torch.tensor([[0, 2], [1, 1], [2, 2]])
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, -1.0]])
    y, dvalues, dW, db = gradients(values, indices, W, torch.tensor([0.0, 10.0]), torch.tensor([[1.0, 2.0]] * 3))
    assert y.tolist() == [[5, 9], [0, 9], [6, 8]]
    assert dvalues.tolist() == [[1, 1], [2, 2], [1, 1]]
    assert dW.tolist() == [[2, 4], [-1, -2], [3, 6]]
    assert db.tolist() == [3, 6]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 3, 50, 37), (300, 20, 90, 130), (33, 64, 2000, 300)])
def test_against_the_oracle(isa, shape, dtype):
    values, indices, W, b = case(*shape, dtype)
    grad = torch.randn(shape[0], shape[3], generator=torch.Generator().manual_seed(9)).to(dtype)
    got = gradients(values, indices, W, b, grad)
    with sk.backend("reference"):
        want = gradients(values.double(), indices, W.double(), b.double(), grad.double())
    for a, e in zip(got, want, strict=True):
        assert a.dtype == dtype and (a.double() - e).norm() <= 4 * torch.finfo(dtype).eps * e.norm()
    with torch.no_grad():
        assert torch.equal(sk.sparse_decode(values, indices, W, b), got[0])


def test_gradient_of_values_alone(isa):
    values, indices, W, b = case(40, 6, 70, 45, torch.float32)
    leaf = values.clone().requires_grad_()
    grad = torch.randn(40, 45, generator=torch.Generator().manual_seed(1))
    sk.sparse_decode(leaf, indices, W, b).backward(grad)
    want = (grad.double() @ W.double().mT).gather(1, indices.long())
    torch.testing.assert_close(leaf.grad.double(), want, rtol=1e-5, atol=1e-5)
    assert not W.requires_grad and W.grad is None


def test_hot_and_unused_latents(isa):
    """One latent on every row, many on none: long segments are summed in spans, empty ones give exact zeros."""
    values, indices, W, b = case(3000, 2, 500, 24, torch.float32)
    indices[:, 0] = 7
    indices[:, 1] = 9
    grad = torch.randn(3000, 24, generator=torch.Generator().manual_seed(1))
    dW = gradients(values, indices, W, b, grad)[2]
    want = values.double().mT @ grad.double()
    torch.testing.assert_close(dW[[7, 9]].double(), want, rtol=1e-5, atol=1e-4)
    dW[[7, 9]] = 0
    assert not dW.any()


def test_shapes_and_strides():
    values, indices, W, b = case(60, 4, 30, 10, torch.float32)
    y = sk.sparse_decode(values, indices, W, b)
    assert torch.equal(sk.sparse_decode(values.view(3, 20, 4), indices.view(3, 20, 4), W, b).view(60, 10), y)
    assert torch.equal(sk.sparse_decode(values[0], indices[0], W, b), y[0])
    assert torch.equal(sk.sparse_decode(values, indices.long(), W, b), y)
    torch.testing.assert_close(sk.sparse_decode(values, indices, W), y - b, rtol=1e-5, atol=1e-5)
    columns = [t.mT.contiguous().mT for t in (values, indices, W)]
    assert torch.equal(sk.sparse_decode(*columns, b), y)
    assert sk.sparse_decode(values[:0], indices[:0], W, b).shape == (0, 10)
    expanded = torch.ones(1, 10).expand(60, 10)  # a gradient with stride 0, as sum() makes
    want = gradients(values, indices, W, b, torch.ones(60, 10))[2]
    assert torch.equal(gradients(values, indices, W, b, expanded)[2], want)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 90), st.integers(1, 90))
def test_any_shape(rows, k, d_sae, d_out):
    values, indices, W, b = case(rows, k, d_sae, d_out, seed=rows)
    want = reference.sparse_decode(values, indices, W, b)
    torch.testing.assert_close(sk.sparse_decode(values, indices, W, b), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    values, indices, W, b = case(5, 3, 12, 7)
    with sk.backend(backend):
        inputs = [t.requires_grad_() for t in (values, W, b)]
        assert torch.autograd.gradcheck(lambda v, w, c: sk.sparse_decode(v, indices, w, c), inputs)


def test_bits_do_not_depend_on_threads(threads):
    values, indices, W, b = case(4000, 16, 300, 70, torch.float32)
    indices[:, 0] = 5
    grad = torch.randn(4000, 70, generator=torch.Generator().manual_seed(1))
    runs = []
    for n in (1, 2, 5):
        threads(n)
        runs.append(gradients(values, indices, W, b, grad)[:3])  # db is torch's own sum
    for other in runs[1:]:
        assert all(torch.equal(a, c) for a, c in zip(runs[0], other, strict=True))


def test_registration():
    for dtype in (torch.float32, torch.float16):
        values, indices, W, b = case(9, 4, 30, 10, dtype)
        ops, grad = torch.ops.sae_kernels, torch.randn(9, 10).to(dtype)
        for args in ((values, indices, W, b), (values[:0], indices[:0].long(), W, None)):
            torch.library.opcheck(ops.sparse_decode.default, args)
        torch.library.opcheck(ops.sparse_decode_backward.default, (grad, values, indices, W))
        torch.library.opcheck(ops.sparse_decode_grad_values.default, (grad, indices, W))


def test_compile_and_export():
    values, indices, W, b = case(9, 4, 30, 10, torch.float32)

    class Decoder(torch.nn.Module):
        def forward(self, values, indices):
            return sk.sparse_decode(values, indices, W, b) * 2

    want = sk.sparse_decode(values, indices, W, b) * 2
    compiled = torch.compile(Decoder(), fullgraph=True, dynamic=True)
    assert torch.equal(compiled(values, indices), want) and torch.equal(compiled(values[:5], indices[:5]), want[:5])
    rows = torch.export.Dim("rows")
    exported = torch.export.export(Decoder(), (values, indices), dynamic_shapes=({0: rows}, {0: rows})).module()
    assert torch.equal(exported(values[:5], indices[:5]), want[:5])


def test_bad_input():
    values, indices, W, b = case(9, 4, 30, 10, torch.float32)
    cases = [
        (ValueError, r"values \(9, 3\) and indices \(9, 4\)", (values[:, :3], indices, W, b)),
        (TypeError, "indices must be int32 or int64, got torch.float32", (values, values, W, b)),
        (ValueError, "W_dec must have 2 dimensions", (values, indices, W[0], b)),
        (ValueError, r"b_dec \(9,\) must be \[d_out\] = \[10\]", (values, indices, W, b[1:])),
        (TypeError, "values must be float32.*torch.int64", (indices.long(), indices, W, b)),
        (TypeError, "W_dec is torch.float64 and values is torch.float32", (values, indices, W.double(), b)),
        (ValueError, "indices is on meta", (values, indices.to("meta"), W, b)),
    ]
    for error, message, args in cases:
        with pytest.raises(error, match=message):
            sk.sparse_decode(*args)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [30, -1, 2**31 - 1])
def test_index_out_of_range(isa, backend, bad):
    values, indices, W, b = case(9, 4, 30, 10, torch.float32)
    indices[8, 3] = bad
    message = rf"indices must be in \[0, d_sae = 30\), got values from .*{bad}"
    with sk.backend(backend), pytest.raises(ValueError, match=message):
        sk.sparse_decode(values, indices, W, b)
    wide = indices.long()
    wide[8, 3] = bad + 2**32  # in range once truncated to 32 bits
    with pytest.raises(ValueError, match="indices must be in"):
        sk.sparse_decode(values, wide, W, b)


@pytest.mark.parametrize("shape", [(100, 4, 30, 10), (8000, 40, 2500, 333)], ids=["by row", "in slices"])
def test_one_bad_index_among_many(isa, shape):
    values, indices, W, b = case(*shape, torch.float32)
    indices[shape[0] - 30, 2] = shape[2]
    with pytest.raises(ValueError, match="indices must be in"):
        sk.sparse_decode(values, indices, W, b)
    with pytest.raises(ValueError, match="indices must be in"):
        sk.sae_loss(torch.zeros(shape[0], shape[3]), values, indices, W, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_results_are_rounded_as_torch_rounds(isa, dtype):
    """Every pattern of bits meets another: ties, denormals, overflow, infinities, NaN."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    W = bits.view(dtype).view(1024, 64)[:, :53].contiguous()
    indices = torch.stack([torch.arange(1024), torch.randperm(1024, generator=torch.Generator().manual_seed(0))], 1)
    got = sk.sparse_decode(torch.ones(1024, 2, dtype=dtype), indices, W)
    want = (W.float() + W[indices[:, 1]].float()).to(dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_a_compiled_graph_raises_on_a_bad_index_too():
    values, indices, W, b = case(9, 4, 30, 10, torch.float32)
    compiled = torch.compile(lambda v, i: sk.sparse_decode(v, i, W, b), fullgraph=True)
    assert torch.equal(compiled(values, indices), sk.sparse_decode(values, indices, W, b))
    with pytest.raises(RuntimeError, match="indices must be in"):
        compiled(values, indices + 30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_in_slices(isa, dtype):
    """A decoder whose rows are used very often is read in slices: the same bits as row by row."""
    g = torch.Generator().manual_seed(0)
    rows, k, d_sae, d = 8000, 40, 2500, 333
    values = torch.randn(rows, k, generator=g).to(dtype)
    indices = torch.randint(0, d_sae, (rows, k), generator=g, dtype=torch.int32)
    W, b = torch.randn(d_sae, d, generator=g).to(dtype), torch.randn(d, generator=g).to(dtype)
    few = slice(4000, 4030)
    got, error = (
        sk.sparse_decode(values, indices, W, b),
        sk.sae_loss(torch.zeros(rows, d, dtype=dtype), values, indices, W, b),
    )
    assert torch.equal(got[few], sk.sparse_decode(values[few], indices[few], W, b))
    assert torch.equal(error.residual, got)
    exact = reference.sparse_decode(values[few].double(), indices[few], W.double(), b.double())
    torch.testing.assert_close(error.errors[few].double(), exact.square().sum(-1), rtol=1e-5, atol=0)


def test_rows_without_entries():
    """k = 0 decodes to the bias alone, whatever stands before it; all gradients are zeros."""
    W, b = torch.randn(4, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    for shape in ((0,), (3, 0), (2, 3, 0)):
        values, indices = torch.zeros(shape, requires_grad=True), torch.zeros(shape, dtype=torch.int32)
        got = sk.sparse_decode(values, indices, W, b)
        assert torch.equal(got, b.expand(*shape[:-1], 5))
        x = torch.randn(*shape[:-1], 5)
        loss = sk.sae_loss(x, values, indices, W, b).errors
        torch.testing.assert_close(loss, (x - b).square().sum(-1))
        grads = torch.autograd.grad(got.sum() + loss.sum(), (values, W))
        assert grads[0].shape == shape and not grads[1].any()
