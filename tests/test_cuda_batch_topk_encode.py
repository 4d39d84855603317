"""The CUDA kernels that choose among a batch's candidates, on a GPU or, by tests/cuda_host, on the CPU."""

import cuda_library
import pytest
import torch

from sae_kernels.cuda import batch_topk_encode as kernel
from sae_kernels.ops import reference


@pytest.fixture(autouse=True, scope="module")
def library():
    cuda_library.load()


def check(values, counts, total, magnitude=False):
    """Bit for bit as the reference, which sorts; values come in any order here. Returns the counts."""
    score = values.abs() if magnitude else values
    order = score.nan_to_num(nan=torch.inf).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(values.shape[1])
    values = values.gather(1, order).masked_fill(place >= counts[:, None], 7.0)  # what is no candidate means nothing
    got = cuda_library.call(kernel.batch_keep, values, counts, total, magnitude)
    want = reference.batch_keep(values.double(), counts, total, magnitude)
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=0, atol=0, equal_nan=True)
    return got[1]


def counts_up_to(rows, m, seed):
    return torch.randint(0, m + 3, (rows,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("rows, m", [(1, 1), (9, 7), (40, 33), (300, 5)])
def test_random(rows, m, magnitude):
    values = torch.randn(rows, m, generator=torch.Generator().manual_seed(m))
    counts = counts_up_to(rows, m, 0)
    found = int(counts.clamp(max=m).sum())
    for total in {1, found // 3, found - 1, found, found + 1, rows * m + 5}:
        if total > 0:
            assert check(values, counts, total, magnitude).sum() == min(total, found)


def test_orders_that_differ_in_one_digit_alone():
    """Bits of a float from the last to the first: each of the three passes decides once."""
    bits = torch.cat([0x3F800000 + torch.arange(64), 0x3F800000 + (torch.arange(64) << 11), torch.arange(64) << 23])
    values = bits.int().view(torch.float32)[torch.randperm(192, generator=torch.Generator().manual_seed(1))]
    values = torch.cat([values, -values]).reshape(32, 12)
    counts = torch.full((32,), 12, dtype=torch.int32)
    for total in range(1, 384, 19):
        check(values, counts, total)


def test_ties_stand_by_row_and_place():
    g = torch.Generator().manual_seed(2)
    values = torch.randint(-2, 3, (50, 9), generator=g).float()
    values[::7, 0] = torch.nan
    values[3] = -0.0
    counts = counts_up_to(50, 9, 3)
    for total in (1, 5, 60, 117, 200):
        check(values, counts, total)
        check(values, counts, total, magnitude=True)
    counts = torch.tensor([4, 0, 2, 9, 4, 4], dtype=torch.int32)
    assert check(torch.ones(6, 4), counts, 7).tolist() == [4, 0, 2, 1, 0, 0]


def test_infinity_and_nothing_at_all():
    values = torch.tensor([[torch.inf, 1.0], [2.0, -torch.inf]])
    for total in (1, 2, 3, 4):
        check(values, torch.tensor([2, 1], dtype=torch.int32), total)
    check(values, torch.zeros(2, dtype=torch.int32), 3)
    for shape in ((0, 4), (3, 0)):
        none = torch.ones(shape[0], dtype=torch.int32)
        kept, counts, threshold = kernel.batch_keep(torch.ones(shape), none, 2, False)
        assert kept.shape == shape and counts.tolist() == [0] * shape[0] and threshold == 0
