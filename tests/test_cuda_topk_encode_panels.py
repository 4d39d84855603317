"""The CUDA encoder of long rows, which writes no pre-activations either, against the fp64 oracle: on a GPU that has its
instructions, or on the CPU.
"""

from functools import partial

import cuda_library
import pytest
import torch
from test_topk_encode import assert_is_topk, in_two_columns_of_eight, small_integers

from sae_kernels.cuda import topk_encode as kernel
from sae_kernels.kernels import tuning
from sae_kernels.ops import reference
from sae_kernels.ops.topk_encode import ACTIVATIONS

encode = partial(cuda_library.call, kernel.topk_encode)
ON_GPU = cuda_library.DEVICE == "cuda"


@pytest.fixture(autouse=True)
def panels_alone(monkeypatch):
    cuda_library.load()
    if ON_GPU and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("this GPU has no wgmma")
    monkeypatch.setattr(kernel, "takes_panels", lambda *_: True)
    monkeypatch.setattr(kernel, "fused_layout", lambda *_: None)
    for name in ("_by_slabs", "_by_sorting"):
        monkeypatch.setattr(kernel, name, lambda *_, name=name: pytest.fail(f"{name} ran"))


def assert_same(got, want):
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0].double(), want[0].double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "rows", "d_in", "d_sae", "k"),
    [(torch.bfloat16, 3, 8, 61, 5), (torch.float16, 130, 72, 300, 32), (torch.bfloat16, 9, 328, 1100, 128)],
)
def test_ties_index_for_index(monkeypatch, dtype, rows, d_in, d_sae, k, activation):
    """Panels, tiles, chunks and strips that are not full; fewer chunks than stages and more."""
    monkeypatch.setattr(kernel, "_FEWEST_STRIP_TILES", 2)
    x, W, b = small_integers(rows, d_in, d_sae, dtype, seed=activation)
    for shift in (0, 400):  # few or no positive latents: the lowest latents fill up
        got = encode(x, W, b - shift, k, activation, None)
        assert_same(got, reference.topk_encode(x, W, b - shift, k, ACTIVATIONS[activation]))


@pytest.mark.parametrize("k", [33, 64, 100, 128])
def test_one_full_segment_of_a_row_that_has_fewer_than_k(k):
    x, W = in_two_columns_of_eight(1024, 8)
    assert_same(encode(x, W, None, k, 0, None), reference.topk_encode(x, W, None, k))


@pytest.mark.parametrize("at_once", [1, 2**26])
def test_random(monkeypatch, at_once):
    """Several launches, whose rows find the buffers of those before; blocks with several panels."""
    monkeypatch.setattr(kernel, "_PANEL_KEYS_BYTES", at_once)
    g = torch.Generator().manual_seed(3)
    rows, d_in, d_sae = ((3000, 1000, 9000) if at_once == 1 else (18000, 200, 2500)) if ON_GPU else (260, 72, 700)
    x, W, b = (torch.randn(*s, generator=g).bfloat16() for s in ((rows, d_in), (d_sae, d_in), (d_sae,)))
    for bias in (b, None):
        for activation in (0, 1):
            assert_is_topk(*encode(x, W, bias, 32, activation, None), x, W, bias, 32, ACTIVATIONS[activation])


@pytest.mark.parametrize("strips, k", [(2, 5), (3, 80), (4, 100), (6, 100)])
def test_merge(strips, k):
    """In registers, in two sizes, and sorted as they are; some strips have fewer than k keys."""
    g = torch.Generator().manual_seed(k)
    scores = torch.randint(1, 30, (7, strips * k), generator=g).float()
    latents = torch.stack([torch.randperm(strips * k, generator=g) for _ in scores])
    orders = scores.view(torch.int32).long() | 1 << 31
    keys = (orders << 32 | (0x7FFFFFFF - latents) << 1).view(7, strips, k)
    keys[:, 1, k // 2 :] = 0
    values, indices = torch.empty(7, k), torch.empty(7, k, dtype=torch.int32)
    got = cuda_library.call(lambda *to: torch.ops.sae_kernels.cuda_topk_merge(*to) or to[1:], keys, values, indices)
    there = keys.flatten(1) != 0
    for row in range(7):
        left = (numbers[row][there[row]].tolist() for numbers in (scores, latents))
        order = sorted((-s, f) for s, f in zip(*left, strict=True))
        assert got[0][row].tolist() == [-s for s, _ in order[:k]] and got[1][row].tolist() == [f for _, f in order[:k]]


@pytest.mark.parametrize("rising", [True, False])
def test_rising_scores_fill_every_buffer_again_and_again(rising):
    scores = torch.arange(1024) if rising else 1024 - torch.arange(1024)
    W = torch.zeros(1024, 16)
    W[:, 0], W[:, 1] = scores // 32 * 32, scores % 32  # exact in 16 bits
    x = torch.zeros(3, 16)
    x[:, :2] = torch.tensor([1.0, 2.0, 4.0])[:, None]
    x, W = x.bfloat16(), W.bfloat16()
    assert_same(encode(x, W, None, 20, 0, None), reference.topk_encode(x, W, None, 20))


def test_nan_and_infinity():
    x, W, b = small_integers(4, 16, 300, torch.float16)
    b[::5] = torch.nan
    assert_same(encode(x, W, b, 70, 1, None), reference.topk_encode(x, W, b, 70, "none"))
    x, W, b = small_integers(4, 16, 300, torch.float16)
    x[1, 3], x[2, 3] = torch.inf, torch.nan  # beyond d_sae: infinity times 0
    W = W.abs() + 1
    assert_same(encode(x, W, b, 120, 0, None), reference.topk_encode(x, W, b, 120))


def test_where_it_is_taken(monkeypatch):
    monkeypatch.undo()
    x, W = torch.zeros(17000, 1536, dtype=torch.bfloat16), torch.zeros(512, 1536, dtype=torch.bfloat16)
    hopper = kernel.Gpu(232_448, True, 132)
    monkeypatch.setattr(kernel, "_gpu_of", lambda device: hopper)
    monkeypatch.setattr(tuning, "table", dict)
    assert kernel.takes_panels(x, W, 128, 1)
    assert not kernel.takes_panels(x[:, :1024].contiguous(), W[:, :1024].contiguous(), 32, 0)  # not measured
    narrow, unaligned = x[:, :1532].contiguous(), x.flatten()[1:1537].view(1, 1536)
    for case in (
        (x, W, 129, 0),
        (x, W, 32, 2),
        (x.float(), W.float(), 32, 0),
        (narrow, W, 32, 0),
        (unaligned, W, 32, 0),
    ):
        assert not kernel.takes_panels(*case)
    assert not kernel.takes_panels(x[:16000], W, 128, 1)  # 125 panels, a strip each, for 132
    monkeypatch.setattr(kernel, "_gpu_of", lambda device: hopper._replace(hopper=False))
    assert not kernel.takes_panels(x, W, 128, 1)


def test_strips():
    for rows, tiles, k, strip in (
        (131072, 96, 64, 96),
        (3000, 96, 64, 16),  # 24 panels for 132 multiprocessors
        (3000, 5, 64, 5),
        (100, 4096, 128, 128),  # 32 strips of 128 keys: the most that are merged
    ):
        assert kernel.strips_of(rows, tiles, k, 132) == strip
