"""The fused CUDA encoder, which writes no pre-activations, against the fp64 oracle: on a GPU or on the CPU."""

from functools import partial
from types import SimpleNamespace

import cuda_library
import pytest
import torch
from test_topk_encode import assert_is_topk, in_two_columns_of_eight, small_integers

from sae_kernels.cuda import threshold_encode as limited
from sae_kernels.cuda import topk_encode as kernel
from sae_kernels.ops import reference
from sae_kernels.ops.topk_encode import ACTIVATIONS

encode, above = (partial(cuda_library.call, f) for f in (kernel.topk_encode, limited.threshold_encode))
ON_GPU = cuda_library.DEVICE == "cuda"


@pytest.fixture(autouse=True, scope="module")
def library():
    cuda_library.load()


@pytest.fixture(autouse=True)
def fused_alone(monkeypatch):
    """Every call here is of a shape that the fused kernel takes; on the CPU with few threads."""
    layout = kernel.fused_layout
    if not ON_GPU:
        gpu = kernel._gpu_of
        monkeypatch.setattr(kernel, "_gpu_of", lambda device: gpu(device)._replace(shared_bytes=232448))
        monkeypatch.setattr(kernel, "fused_layout", lambda *shape: layout(*shape)._replace(groups=1))
    for name in ("_by_slabs", "_by_sorting"):
        monkeypatch.setattr(kernel, name, lambda *_, name=name: pytest.fail(f"{name} ran"))


def assert_same(got, want):
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0].double(), want[0].double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", range(3))
@pytest.mark.parametrize(
    "rows, d_in, d_sae, k",
    [(3, 6, 61, 5), (20, 64, 512, 32), (5, 100, 700, 40), (5, 136, 1088, 64), (2, 256, 192, 128)],
)
def test_ties_index_for_index(rows, d_in, d_sae, k, activation, dtype):
    """One, two and four chunks of depth, not all of them full; with a first bound or none; both sizes of buffers; tiles
    that d_sae does not fill.
    """
    x, W, b = small_integers(rows, d_in, d_sae, dtype, seed=activation)
    for shift in (0, 400):  # few or no positive latents: the lowest latents fill up
        got = encode(x, W, b - shift, k, activation, None)
        assert_same(got, reference.topk_encode(x, W, b - shift, k, ACTIVATIONS[activation]))


@pytest.mark.parametrize("d_in", [16, 64, 120, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random(dtype, d_in):
    g = torch.Generator().manual_seed(3)
    rows, d_sae = (1000, 8192) if ON_GPU else (9, 1024)
    x, W, b = (torch.randn(*s, generator=g).to(dtype) for s in ((rows, d_in), (d_sae, d_in), (d_sae,)))
    for bias in (b, None):
        for activation, name in enumerate(ACTIVATIONS):
            assert_is_topk(*encode(x, W, bias, 32, activation, None), x, W, bias, 32, name)


@pytest.mark.parametrize("kind", ["ascending", "descending", "equal", "negative"])
def test_adversarial_orders(kind):
    """Rising scores fill every buffer again and again; equal ones pass every bound."""
    d_sae, k = 1024, 20
    scores = {
        "ascending": torch.arange(d_sae), "descending": -torch.arange(d_sae) + d_sae, "equal": torch.ones(d_sae),
        "negative": -torch.arange(d_sae) - 1,
    }[kind]  # fmt: skip
    W = torch.zeros(d_sae, 16)
    W[:, 0], W[:, 1] = scores // 32 * 32, scores % 32  # exact in 16 bits
    x = torch.zeros(3, 16)
    x[:, :2] = torch.tensor([1.0, 2.0, 4.0])[:, None]
    x, W = x.bfloat16(), W.bfloat16()
    for activation, name in enumerate(ACTIVATIONS):
        assert_same(encode(x, W, None, k, activation, None), reference.topk_encode(x, W, None, k, name))


@pytest.mark.parametrize("k", [33, 40, 41, 64, 128])
def test_one_full_segment_of_a_row_that_has_fewer_than_k(k):
    """Its cut leaves them all, and rules nothing out as long as there are fewer than k."""
    x, W = in_two_columns_of_eight(1024)
    assert_same(encode(x, W, None, k, 0, None), reference.topk_encode(x, W, None, k))
    got = above(x, W, None, torch.zeros(1), k, 0, None)
    assert_same(got, reference.threshold_encode(x, W, None, torch.zeros(1), k))


@pytest.mark.parametrize("slots", [64, 128, 200, 256])
def test_a_row_that_has_all_buffers_of_its_block_cut(slots):
    """The first one passes with everything, the others with a few or many of every fourth latent, in descending order:
    they have fewer than all slots when it happens.
    """
    f = torch.arange(1024)
    W = torch.stack([torch.ones(1024), torch.where(f % 4 == 0, 240 - f // 8, -1)], 1).bfloat16()
    x = torch.stack([-torch.linspace(236, 110, 40).round(), torch.ones(40)], 1).bfloat16()
    x[0] = torch.tensor([64, 0])
    want = reference.threshold_encode(x, W, None, torch.zeros(1), slots)
    counts = want[2].tolist()
    assert max(counts) == 1024 and sum(0 < count < slots for count in counts) >= 3
    got = above(x, W, None, torch.zeros(1), slots, 0, None)
    assert_same(got, want)
    assert torch.equal(got[2], want[2])


@pytest.mark.parametrize("activation", range(3))
def test_nan_and_infinity(activation):
    x, W, b = small_integers(4, 16, 576, torch.float16)
    for fill in (torch.nan, torch.inf, -torch.inf):
        bias = b.clone()
        bias[::5] = fill
        for k in (7, 120):
            got = encode(x, W, bias, k, activation, None)
            assert_same(got, reference.topk_encode(x, W, bias, k, ACTIVATIONS[activation]))
    x[1, 3] = torch.nan
    values, indices = encode(x, W, b, 6, activation, None)
    assert values[1].isnan().all() and indices[1].tolist() == list(range(6))
    assert_same((values[2:], indices[2:]), reference.topk_encode(x[2:], W, b, 6, ACTIVATIONS[activation]))
    x[1, 3] = torch.inf  # a tile's latents beyond d_sae are infinity times 0
    W, b, k = W[:150].abs() + 1, b[:150], 100
    assert_same(encode(x, W, b, k, activation, None), reference.topk_encode(x, W, b, k, ACTIVATIONS[activation]))


def test_latents_beyond_d_sae_do_not_count_among_the_k():
    """Of an infinite row they are NaN: ten of them and ten latents make k, beside rows that have exactly k as well."""
    g = torch.Generator().manual_seed(1)
    x, W = torch.randn(4, 16, generator=g), torch.randn(118, 16, generator=g)
    x[1, 3], W[:, 3] = torch.inf, -1
    W[5:15, 3] = 1
    x, W = x.half(), W.half()
    for k in (15, 20):
        got, want = encode(x, W, None, k, 0, None), reference.topk_encode(x, W, None, k)
        assert got[1][1].tolist() == want[1][1].tolist() and torch.equal(got[0][1].double(), want[0][1].double())
        assert_is_topk(got[0][[0, 2, 3]], got[1][[0, 2, 3]], x[[0, 2, 3]], W, None, k, "relu")


@pytest.mark.parametrize("d_in, stages, sample", [(200, 7, 0), (200, 8, 2), (100, 9, 4), (40, 16, 8), (40, 4, 2)])
def test_any_number_of_stages_and_of_tiles_in_the_sample(monkeypatch, d_in, stages, sample):
    layout = kernel.fused_layout
    monkeypatch.setattr(kernel, "fused_layout", lambda *s: layout(*s)._replace(groups=1, stages=stages, sample=sample))
    x, W, b = small_integers(20, d_in, 500, torch.bfloat16)
    assert_same(encode(x, W, b, 9, 0, None), reference.topk_encode(x, W, b, 9))


@pytest.mark.parametrize("activation", range(3))
@pytest.mark.parametrize("per_latent", [True, False])
def test_thresholds(per_latent, activation):
    x, W, b = small_integers(20, 40, 320, torch.bfloat16)
    g = torch.Generator().manual_seed(5)
    threshold = torch.randint(0, 60, (320 if per_latent else 1,), generator=g).float()
    for max_active in (6, 100, 200):  # a buffer of each size
        got = above(x, W, b, threshold, max_active, activation, None)
        want = reference.threshold_encode(x, W, b, threshold, max_active, ACTIVATIONS[activation])
        assert_same(got, want)
        assert torch.equal(got[2], want[2]) and want[2].max() > 0


@pytest.fixture
def guesses(monkeypatch):
    """Every call guesses from 40 rows; gives of each the rows that were left to the second try, and the guess."""
    told, op = [], kernel._ops.cuda_topk_encode_fused
    monkeypatch.setattr(kernel, "_GUESS_ROWS", 40)
    monkeypatch.setattr(kernel, "_FEWEST_ROUNDS", 0)

    def spy(*args):
        op(*args)
        numbers, norms = args[6:8]
        left = numbers[: numbers[-1].item()].tolist()
        assert len(set(left)) == len(left)
        told.append((left, norms[-1].item()))

    monkeypatch.setattr(kernel, "_ops", SimpleNamespace(cuda_topk_encode_fused=spy))
    return told


@pytest.mark.parametrize("d_in, activation, k", [(40, 0, 9), (100, 1, 9), (200, 0, 60)])
def test_bounds_that_are_guessed(guesses, d_in, activation, k):
    """More rows than the blocks take at a time. Of those that the guess was too high for, just these come again: here
    every twentieth, whose scores are half as high for its norm, and what the others' spread brings.
    """
    x, W, b = small_integers(270, d_in, 192, torch.bfloat16)
    W[:, -1] = 0
    others = torch.arange(270) % 20 > 0
    x[:, -1] = torch.where(others, 0, 2 * x.float().norm(dim=1)).bfloat16()
    want = reference.topk_encode(x, W, b, k, ACTIVATIONS[activation])
    assert_same(encode(x, W, b, k, activation, None), want)
    ((left, guess),) = guesses
    bound = guess * x.double().norm(dim=1)
    certain = (want[0][:, -1] - bound).abs() > 1e-3 * bound  # rounding apart
    missed = want[0][:, -1] < bound
    assert guess > 0 and {*missed.logical_and(certain).nonzero()[:, 0].tolist()} <= {*left}
    assert {*left} <= {*missed.logical_or(~certain).nonzero()[:, 0].tolist()}


def test_a_sample_that_misleads(guesses, monkeypatch):
    """The rows of the sample reach far higher than the others: all of these come again."""
    x, W, b = small_integers(90, 40, 192, torch.float16)
    W[:, :8], x[:, :8] = 0, 0
    share = 90 // 40
    sampled = torch.tensor([i * share + (i * 2654435769 % 2**32 >> 8) % share for i in range(40)])
    x[:, 0] = 2000
    x[sampled, 0] = 0
    assert_same(encode(x, W, b, 20, 0, None), reference.topk_encode(x, W, b, 20))
    ((left, guess),) = guesses
    assert guess > 0 and {*range(90)} - {*sampled.tolist()} <= {*left}


@pytest.mark.parametrize("case", ["few fire", "zero rows", "nan", "infinite", "norm overflows"])
@pytest.mark.parametrize("activation", [0, 1])
def test_rows_that_no_guess_fits(guesses, activation, case):
    x, W, b = small_integers(70, 40, 192, torch.bfloat16)
    if case == "few fire":
        b = b - 400
    elif case == "zero rows":
        x[::3] = 0
    elif case == "nan":
        x[::7, 3] = torch.nan
    elif case == "infinite":
        x[5, 3] = torch.inf
        W = W.abs() + 1
    else:
        x[::9] *= 2.0**100
    got, want = encode(x, W, b, 20, activation, None), reference.topk_encode(x, W, b, 20, ACTIVATIONS[activation])
    if case == "norm overflows":  # in float32 and float64 the same latents, but not all of them the same sums
        got, want = ([v.float() for v in code] for code in (got, want))
    assert_same(got, want)
    ((left, guess),) = guesses
    if case == "few fire" and activation == 0:
        assert guess == 0 and not left


def test_where_it_pays_to_guess(monkeypatch):
    monkeypatch.undo()
    layout = kernel.FusedLayout(groups=3, stages=5, sample=64, image_bytes=0)
    monkeypatch.setattr(kernel, "_gpu_of", lambda device: kernel.Gpu(232448, True, 132))
    least = 8 * 3 * 64 * 132
    x = torch.zeros(1, dtype=torch.bfloat16).expand(least, 64)
    assert kernel.pays_to_guess(x, 0, layout) and kernel.pays_to_guess(x, 1, layout)
    assert not kernel.pays_to_guess(x, 2, layout) and not kernel.pays_to_guess(x[1:], 0, layout)
    assert not kernel.pays_to_guess(x[:1].expand(2**31, 64), 0, layout)


def test_two_runs_agree_bit_for_bit():
    g = torch.Generator().manual_seed(7)
    x, W = (torch.randn(*s, generator=g).bfloat16() for s in ((200 if ON_GPU else 20, 64), (1024, 64)))
    first, second = (encode(x, W, None, 16, 0, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_layout_fits_and_says_where_it_does_not(monkeypatch):
    monkeypatch.undo()
    for shared, hopper, shapes in ((232448, True, 3), (166912, False, 3), (101376, False, 1)):  # sm_90, sm_80, sm_86
        for d_in, k in ((64, 32), (256, 32), (256, 128))[:shapes]:
            layout = kernel.fused_layout(torch.bfloat16, d_in, 16384, k, shared, hopper)
            keys = 96 if k <= 40 else 160
            assert 1 <= layout.groups <= (3 if hopper else 256 // d_in) and layout.stages >= d_in // 64 + 3
            assert 2064 + layout.stages * 9488 + layout.groups * 64 * keys * 8 <= shared
            assert layout.sample == ({64: 256, 256: 16}[d_in] if k <= 32 else 0)
            assert layout.image_bytes == 16384 * (2 * d_in + 20)
    refused = [(torch.float32, 64, 4096, 32), (torch.bfloat16, 61, 4096, 32), (torch.bfloat16, 258, 4096, 32),
               (torch.bfloat16, 64, 4096, 129)]  # fmt: skip
    assert not any(kernel.fused_layout(*shape, 232448, True) for shape in refused)
    assert kernel.fused_layout(torch.bfloat16, 256, 16384, 128, 101376, False) is None
    # up to 256 where a threshold leaves few
    assert kernel.fused_layout(torch.bfloat16, 64, 4096, 256, 232448, True, True).groups == 1
    assert kernel.fused_layout(torch.bfloat16, 64, 4096, 257, 232448, True, True) is None
    assert kernel.fused_layout(torch.bfloat16, 64, 4096, 256, 232448, True) is None
    assert kernel.fused_layout(torch.bfloat16, 64, 262016, 32, 232448, True, True)
    assert kernel.fused_layout(torch.bfloat16, 64, 262017, 32, 232448, True, True) is None
