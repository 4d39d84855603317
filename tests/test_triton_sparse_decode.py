"""The Triton kernels of sparse_decode and of the weight gradients against the fp64 oracle, on a GPU or in the
interpreter.
"""

import pytest
import torch
from triton_interpreter import DEVICE, need_a_place_to_run

need_a_place_to_run()

from test_sparse_decode import DTYPES, case, gradients  # noqa: E402

import sae_kernels as sk  # noqa: E402
from sae_kernels.kernels import sparse_decode as kernel  # noqa: E402
from sae_kernels.kernels import tuning  # noqa: E402
from sae_kernels.kernels.latent_sums import Chunks, latent_sums  # noqa: E402


@pytest.fixture(autouse=True)
def on_triton():
    with sk.backend("triton"):
        yield


def on_device(*tensors):
    return [t.to(DEVICE) for t in tensors]


def oracle(values, indices, W, b, grad):
    with sk.backend("reference"):
        return gradients(values.double(), indices, W.double(), b.double(), grad.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 3, 10, 37), (3, 9, 12, 150)])
def test_against_the_oracle(shape, dtype):
    tensors = on_device(*case(*shape, dtype))
    grad = torch.randn(shape[0], shape[3], generator=torch.Generator().manual_seed(9)).to(DEVICE, dtype)
    got = gradients(*tensors, grad)
    for a, e in zip(got, oracle(*tensors, grad), strict=True):
        assert a.dtype == dtype and (a.double() - e).norm() <= 4 * torch.finfo(dtype).eps * e.norm()
    assert all(torch.equal(a, c) for a, c in zip(got[:3], gradients(*tensors, grad), strict=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_multiplied_whole(monkeypatch, dtype):
    """The rule's two sides agree; several chunks of rows, a repeated index, one that is out of range."""
    values, indices, W, b = on_device(*case(40, 6, 60, 37, dtype))
    indices[3, 1] = indices[3, 0]
    want, calls = oracle(values, indices, W, b, values.new_zeros(40, 37))[0], []
    wrong = indices.clone()
    wrong[7, 2], wrong[9, 0] = 60, -1
    original = kernel.decode_dense
    monkeypatch.setattr(kernel, "decode_dense", lambda *a: calls.append(a) or original(*a))
    monkeypatch.setattr(tuning, "slab_plan", lambda size: tuning.SlabPlan(nbytes=16 * (60 * 2 + 4 * 37)))
    for most, dense in ((9, False), (10, True)):
        with tuning.trying("decode", dense_below=most):
            got = sk.sparse_decode(values, indices, W, b)
            spoilt = sk.sparse_decode(values, wrong, W, None)
        assert bool(calls) == dense and got.dtype == dtype
        assert (got.double() - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()
        assert spoilt.isnan().any(1).nonzero().flatten().tolist() == [7, 9] and spoilt[7].isnan().all()
    with tuning.trying("decode", dense_below=10):
        assert not kernel.goes_dense(60, 37, 6, torch.float32) and kernel.goes_dense(60, 37, 6, dtype)


def test_gradients_in_one_pass_and_in_two(monkeypatch):
    """Rows that fit one program give both gradients from one read; longer ones take two kernels."""
    tensors = on_device(*case(5, 4, 9, 100, torch.float32))
    grad = torch.randn(5, 100, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    one = gradients(*tensors, grad)
    monkeypatch.setattr(tuning, "widest_row", lambda element_size: 64)
    two = gradients(*tensors, grad)
    torch.testing.assert_close(two[1], one[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(two[2], one[2], rtol=1e-5, atol=1e-5)


def test_gradient_of_values_alone():
    values, indices, W, b = on_device(*case(6, 6, 20, 45, torch.float32))
    leaf = values.clone().requires_grad_()
    grad = torch.randn(6, 45, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    sk.sparse_decode(leaf, indices, W, b).backward(grad)
    want = (grad.double() @ W.double().mT).gather(1, indices.long())
    torch.testing.assert_close(leaf.grad.double(), want, rtol=1e-5, atol=1e-5)
    assert not W.requires_grad and W.grad is None


@pytest.mark.parametrize(
    ("chunk", "dtype"), [(1, torch.float32), (5, torch.float64), (16, torch.float32), (99, torch.float32)]
)
def test_long_and_empty_segments(chunk, dtype):
    """Latent 7 fires on every row, 9 on half, most never: chunks of any length, and exact zeros elsewhere."""
    values, indices, _, _ = case(40, 2, 20, 24, dtype)
    indices[:, 0] = 7
    indices[:, 1] = torch.where(torch.arange(40) % 2 == 0, 9, 3)
    rows = torch.randn(40, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    device = on_device(indices, values, rows)
    W = torch.randn(20, 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    sums, totals, dots = latent_sums(*device, 20, with_totals=True, W=W.to(DEVICE), chunk=chunk)
    codes = torch.zeros(40, 20, dtype=torch.float64).scatter_add(1, indices.long(), values.double())
    bound = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(sums.cpu().double(), codes.mT @ rows.double(), rtol=bound, atol=20 * bound)
    torch.testing.assert_close(totals.cpu().double(), codes.sum(0), rtol=bound, atol=20 * bound)
    exact = (rows.double() @ W.double().mT).gather(1, indices.long())
    torch.testing.assert_close(dots.cpu().double(), exact, rtol=bound, atol=20 * bound)
    silent = codes.abs().sum(0) == 0
    assert silent.sum() == 17 and not sums.cpu()[silent].any() and not totals.cpu()[silent].any()
    again = latent_sums(*device, 20, with_totals=True, chunk=chunk)
    assert torch.equal(again[0], sums) and torch.equal(again[1], totals)
    assert latent_sums(*device, 20, chunk=chunk)[1:] == (None, None)


@pytest.mark.parametrize("d_sae", [9, 2**15 - 1, 2**15])
def test_indices_are_sorted_in_few_bits(d_sae):
    """What is out of range, by however much, counts nowhere: none of it comes round to a latent."""
    index = torch.tensor([[3, -1, d_sae - 1], [2**16 + 3, 3, d_sae], [3 - 2**16, 2**32 + 3, 3]])
    chunks = Chunks(index.to(DEVICE), d_sae, 2)
    order, *programs = (t.tolist() for t in chunks.of_programs)
    found = {(latent, tuple(order[begin:end])): slot for latent, begin, end, slot in zip(*programs, strict=True)}
    want = {(3, (0, 4)): 0, (3, (8,)): 1, (d_sae - 1, (2,)): -1}
    assert {program: slot for program, slot in found.items() if program[0] < d_sae and program[1]} == want
    assert [latent for latent in programs[0] if latent < d_sae] == sorted([*range(d_sae), 3])
    assert chunks.split_latents.tolist() == [3, d_sae, d_sae, d_sae]


def test_partial_sums_stay_within_their_workspace():
    for entries, d in ((2**10, 64), (2**25, 256), (2**25, 4096)):
        chunk = tuning.chunk_length(entries, d, 2)
        assert chunk >= 256 and (2 * entries // chunk) * d * 4 <= tuning.SLOT_BYTES


def test_shapes_and_strides():
    values, indices, W, b = on_device(*case(12, 4, 30, 10, torch.float32))
    y = sk.sparse_decode(values, indices, W, b)
    assert torch.equal(sk.sparse_decode(values.view(3, 4, 4), indices.view(3, 4, 4), W, b).view(12, 10), y)
    assert torch.equal(sk.sparse_decode(values, indices.long(), W, b), y)
    torch.testing.assert_close(sk.sparse_decode(values, indices, W), y - b, rtol=1e-5, atol=1e-5)
    columns = [t.mT.contiguous().mT for t in (values, indices, W)]
    assert torch.equal(sk.sparse_decode(*columns, b), y)
    assert sk.sparse_decode(values[:0], indices[:0], W, b).shape == (0, 10)
    empty = gradients(values[:0], indices[:0], W, b, torch.ones(0, 10, device=DEVICE))
    assert not empty[2].any() and empty[1].shape == (0, 4)
    ones = torch.ones(12, 10, device=DEVICE)
    expanded = gradients(values, indices, W, b, torch.ones(1, 10, device=DEVICE).expand(12, 10))
    assert torch.equal(expanded[2], gradients(values, indices, W, b, ones)[2])


@pytest.mark.parametrize("bad", [30, -1, 2**31 - 1, 2**40])
def test_an_index_out_of_range_spoils_its_row_alone(bad):
    values, indices, W, b = case(9, 4, 30, 10, torch.float32)
    indices = indices.long()
    indices[8, 3] = bad
    tensors = on_device(values, indices, W, b)
    y, dvalues, dW, _ = gradients(*tensors, torch.ones(9, 10, device=DEVICE))
    good = gradients(*on_device(values[:8], indices[:8], W, b), torch.ones(8, 10, device=DEVICE))
    assert y[8].isnan().all() and torch.equal(y[:8], good[0])
    assert dvalues[8, 3].isnan() and dvalues[8, :3].isfinite().all()
    kept = gradients(*on_device(values[8:, :3], indices[8:, :3], W, b), torch.ones(1, 10, device=DEVICE))
    torch.testing.assert_close(dW, good[2] + kept[2], rtol=1e-5, atol=1e-5)


def test_registration():
    values, indices, W, b = on_device(*case(3, 4, 9, 10, torch.float32))
    ops, grad = torch.ops.sae_kernels, torch.randn(3, 10, device=DEVICE)
    torch.library.opcheck(ops.sparse_decode_triton.default, (values, indices, W, b))
    torch.library.opcheck(ops.sparse_decode_triton_backward.default, (grad, values, indices, W))
    torch.library.opcheck(ops.sparse_decode_triton_grad_values.default, (grad, indices, W))


if DEVICE == "cuda":

    def test_outputs_beyond_2_to_31_elements():
        rows, d_out = 2**19 + 1, 4096
        W = torch.randn(3, d_out, device=DEVICE, dtype=torch.float16)
        indices = (torch.arange(rows, device=DEVICE) % 3)[:, None].int()
        y = sk.sparse_decode(torch.ones(rows, 1, device=DEVICE, dtype=torch.float16), indices, W)
        assert torch.equal(y[-3:], W[indices[-3:, 0].long()])
