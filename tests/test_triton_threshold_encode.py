"""threshold_encode and batch_topk_encode on the Triton kernels against the oracle, on a GPU or in the interpreter."""

import dataclasses

import pytest
import torch
from triton_interpreter import DEVICE, INTERPRETED, need_a_place_to_run, patch_interpreter

need_a_place_to_run()

from test_threshold_encode import assert_same, oracle  # noqa: E402
from test_topk_encode import EPS, small_integers  # noqa: E402

import sae_kernels as sk  # noqa: E402
from sae_kernels.kernels import threshold_encode as kernel  # noqa: E402
from sae_kernels.kernels import tuning  # noqa: E402
from sae_kernels.ops import reference  # noqa: E402
from sae_kernels.ops.topk_encode import ACTIVATIONS  # noqa: E402

if INTERPRETED:
    patch_interpreter()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def on_triton():
    with sk.backend("triton"):
        yield


def on_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def run(x, W, b, threshold, max_active, activation="relu", mask=None):
    x, W, b, mask = on_device(x, W, b, mask)
    threshold = threshold.to(DEVICE) if isinstance(threshold, torch.Tensor) else threshold
    got = sk.threshold_encode(x, W, b, threshold, max_active=max_active, activation=activation, latent_mask=mask)
    return [t.cpu() for t in got]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_exact_arithmetic_entry_for_entry(activation, dtype):
    x, W, b = small_integers(3, 9, 417, dtype)
    g = torch.Generator().manual_seed(1)
    mask, each = torch.rand(417, generator=g) < 0.4, torch.randint(-8, 25, (417,), generator=g).float()
    for latent_mask, threshold, max_active in ((None, 6.0, 9), (mask, each, 40), (None, each, 400), (mask, 99.0, 3)):
        got = run(x, W, b, threshold, max_active, activation, latent_mask)
        assert got[0].dtype == dtype
        assert_same(got, oracle(x, W, b, threshold, max_active, activation, latent_mask))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_chunks_of_rows_and_latents(monkeypatch, activation):
    monkeypatch.setattr(tuning, "slab_shape", lambda rows, d_sae, nbytes: (min(rows, 4), min(d_sae, 100)))
    x, W, b = small_integers(6, 9, 250, torch.float32)
    each = torch.arange(250.0) % 13
    for threshold, max_active in ((each, 20), (-torch.inf, 100)):
        assert_same(run(x, W, b, threshold, max_active, activation), oracle(x, W, b, threshold, max_active, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf(activation):
    x, W, b = small_integers(2, 9, 150, torch.float32)
    for fill in (torch.nan, torch.inf, -torch.inf):
        bias = b.clone()
        bias[::5] = fill
        assert_same(run(x, W, bias, 3.0, 60, activation), oracle(x, W, bias, 3.0, 60, activation))


@pytest.mark.parametrize("activation", range(3))
def test_fused(monkeypatch, activation):
    """A threshold for all and one for each; rows of which nothing passes, few, more than there are slots; overflows
    of the groups, whose rows are done over; NaN.
    """
    x, W, b = small_integers(3, 9, 1030, torch.float32, seed=activation)
    each = torch.randint(-8, 60, (1030,), generator=torch.Generator().manual_seed(1)).float().clamp(min=-30)
    b[::97] = torch.nan
    for threshold, room in ((torch.tensor([9.0]), None), (each, None), (each.clamp(max=1), 2), (each + 99, None)):
        limit = threshold if activation == 1 else threshold.clamp(min=0)
        if room:
            plan = tuning.fused_plan
            monkeypatch.setattr(tuning, "fused_plan", lambda *a, p=plan: dataclasses.replace(p(*a), room=2, rows=2))
        got = kernel.threshold_encode(*on_device(x, W, b, limit), 20, activation, None, "fused")
        shown = threshold[0].item() if len(threshold) == 1 else threshold
        want = oracle(x, W, b, shown, 20, ACTIVATIONS[activation])
        assert_same([t.cpu() for t in got], want)


def test_public_functions():
    """Empty input, float64, gradients, the kernel that is asked for, and batch_topk_encode on top of it."""
    x, W, b = small_integers(12, 10, 77, torch.float32)
    assert run(x[:0], W, b, 1.0, 6)[0].shape == (0, 6)
    assert_same(run(x.double(), W.double(), b.double(), 2.0, 6), oracle(x, W, b, 2.0, 6))
    grads = {}
    for backend in ("triton", "reference"):
        leaves = [t.requires_grad_() for t in on_device(*(t.clone() for t in (x, W, b)))]
        with sk.backend(backend):
            values, _, _, threshold = sk.batch_topk_encode(*leaves, 4)
            values.square().sum().backward()
        grads[backend] = [values.detach(), threshold, *(t.grad for t in leaves)]
    for got, want in zip(grads["triton"], grads["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=8 * EPS[torch.float32], atol=1e-4)
    calls, original = [], kernel.threshold_encode
    kernel.threshold_encode = lambda *a: calls.append(a) or original(*a)
    try:
        run(x, W, b, 1.0, 6)
        with sk.backend("reference"):
            run(x, W, b, 1.0, 6)
    finally:
        kernel.threshold_encode = original
    assert len(calls) == 1 and reference.accumulator(x.dtype) == torch.float32
    args = (*on_device(x[:2], W, b, torch.ones(1)), 4, 0, None)
    torch.library.opcheck(torch.ops.sae_kernels.threshold_encode_triton.default, args)


def test_the_whole_batch_is_chosen_without_waiting_for_the_device(monkeypatch):
    x, W, b = on_device(*small_integers(5, 8, 60, torch.float32))
    with monkeypatch.context() as watched:
        for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "__index__"):
            watched.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
        found = sk.batch_topk_encode(x, W, b, 3)
    with sk.backend("reference"):
        want = sk.batch_topk_encode(x, W, b, 3)
    assert all(torch.equal(a, e) for a, e in zip(found, want, strict=True))
