"""The CUDA kernels of ActivationStats: the bits of the reference, on a GPU or, by tests/cuda_host, on the CPU."""

import cuda_library
import pytest
import torch
from cuda_library import DEVICE
from test_activation_stats import FULL, D, codes, same

import sae_kernels as sk
from sae_kernels.ops import _stats_gpu
from sae_kernels.ops.activation_stats import ActivationStats


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch):
    cuda_library.load()
    if DEVICE == "cpu":
        cuda_library.pretend(monkeypatch)
    with sk.backend("cuda"):
        yield


def on_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def pair(batches, **settings):
    """The same batches through CUDA and through the reference on the CPU."""
    mine, plain = ActivationStats(D, device=DEVICE, **settings), ActivationStats(D, **settings)
    for batch in batches:
        mine.update(*on_device(*batch))
        with sk.backend("reference"):
            plain.update(*batch)
    return mine.to("cpu"), plain


@pytest.mark.parametrize(
    ("dtype", "index_dtype"),
    [
        (torch.float32, torch.int32),
        (torch.float64, torch.int64),
        (torch.bfloat16, torch.int64),
        (torch.float16, torch.int32),
    ],
)
def test_the_bits_of_the_reference(dtype, index_dtype):
    """Two tables of latents; both signs, NaN, infinities and what is too large."""
    values, indices = codes(40, 9, dtype=dtype)
    values *= torch.logspace(-12, 2, 40)[:, None].to(dtype)
    values[::50, 3], values[::7, 2], values[3, 1] = torch.nan, -torch.inf, 2.0**22 if dtype != torch.float16 else 1
    indices = indices.to(index_dtype)
    mine, plain = pair([(values[:30], indices[:30]), (values[30:], indices[30:])], **FULL)
    assert same(mine, plain) and plain.rejected.sum() > 5 and plain.counts.min() > 0


def test_rounding_to_a_multiple_of_2_to_minus_64():
    """Ties to even, cancellation and borrows over every limb, the largest magnitudes, the smallest, subnormals."""
    tiny = 2.0**-64
    values = [1e6, 2**-40, -1e6, 3 * tiny, -2 * tiny, 0.5 * tiny, 1.5 * tiny, 2.5 * tiny, -0.5 * tiny, 1 / 3, -1 / 7]
    values += [2.0**22 - 2.0**-30, -(2.0**22) + 2.0**-30, 2.0**-32.5, 1 + 2.0**-50, -tiny, 5e-324, -1e-310, 2.0**-127]
    values = torch.tensor(values, dtype=torch.float64)
    mine, plain = pair([(values[:, None], torch.zeros(len(values), 1, dtype=torch.int32))] * 3)
    assert same(mine, plain) and mine.counts[0] == 3 * len(values)
    alone = torch.arange(len(values))[None] + 15  # each in a latent of its own, where sums are negative
    assert same(*pair([(values.abs().neg()[None], alone)]))


def test_many_shares_and_a_latent_that_always_fires():
    """Several blocks add to the same latents; a row lies across the end of one share."""
    values, indices = codes(260, D, seed=5)
    values[:, 0] = -values[:, 0].abs() - 1
    mine, plain = pair([(values, indices)])
    assert same(mine, plain) and plain.counts.min() > 100 and values.numel() > 8 * 1024


@pytest.mark.parametrize("kept", [1, 3, 40])
def test_top_examples(kept):
    """More kept than a warp is wide, many ties, ids given twice, batch upon batch."""
    g = torch.Generator().manual_seed(kept)
    batches = []
    for rows in (60, 9):
        values = torch.randint(-2, 6, (rows, 2), generator=g).float()
        latents = torch.stack([torch.full((rows,), 5), torch.randint(6, 9, (rows,), generator=g)], 1)
        batches.append((values, latents.int(), torch.randint(0, 40, (rows,), generator=g)))
    mine, plain = pair(batches, top=kept)
    assert same(mine, plain) and (plain.top_ids[5] >= 0).all() and (plain.top_ids[0] == -1).all()


def test_masked_rows_and_a_subset():
    values, indices = codes(30, 5, seed=2)
    mask = torch.rand(10, generator=torch.Generator().manual_seed(3)) < 0.5
    spoilt, padded = values.clone(), indices.clone()
    spoilt[:10][~mask], padded[:10][~mask] = torch.nan, -1
    batches = [(spoilt[:10], padded[:10], None, mask), (values[10:], indices[10:])]
    subset = {**FULL, "cooccurrence": torch.tensor([30, 2, 11, 5])}
    mine, plain = pair(batches, **subset, first_row=7)
    assert same(mine, plain) and mine.rows == plain.rows and plain.cooccurrence.sum() > 0
    empty = ActivationStats(D, device=DEVICE, **FULL)
    empty.update(*on_device(torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.int64)))
    assert empty.rows == 3 and not empty.counts.any()


def test_an_index_out_of_range_counts_nowhere_and_is_told():
    values, indices = codes(8, 4)
    wrong = indices.long()
    wrong[2, 1], wrong[5, 3] = D, -(2**40)
    mine = ActivationStats(D, device=DEVICE, **FULL)
    mine.update(*on_device(values, wrong))
    with pytest.raises(ValueError, match="2 entries of the batches so far were not"):
        mine.state_dict()
    plain = ActivationStats(D, **FULL)
    with sk.backend("reference"):
        plain.update(torch.where((wrong < 0) | (wrong >= D), 0, values), indices)
    assert same(mine.to("cpu"), plain)


def test_nothing_waits_for_the_device(monkeypatch):
    values, indices = on_device(*codes(10, 6))
    mask = torch.ones(10, dtype=torch.bool, device=DEVICE)
    stats = ActivationStats(D, device=DEVICE, **FULL)
    stats.update(values, indices)
    with monkeypatch.context() as watched:
        for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "__index__"):
            watched.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
        stats.update(values, indices, None, mask)
        stats.update(values, indices)
    assert stats.rows == 30


def test_tables_stand_in_for_triton_where_no_backend_is_forced(monkeypatch):
    tables, atomics = (_stats_gpu.KERNELS[name]["update"] for name in ("cuda", "triton"))
    few, many = _stats_gpu.MOST_IN_TABLES, _stats_gpu.MOST_IN_TABLES + 1

    def chosen(d_sae, **picked):
        monkeypatch.setattr(_stats_gpu, "pick", lambda device, on_cuda="triton": picked[on_cuda])
        found = _stats_gpu.kernels(torch.device(DEVICE), d_sae)
        return found and found["update"]

    assert chosen(few, triton="triton", cuda="cuda") is tables and chosen(many, triton="triton", cuda="cuda") is atomics
    assert chosen(few, triton="triton", cuda="triton") is atomics  # forced, or CUDA is not built
    assert chosen(many, triton="cuda", cuda="cuda") is tables
    assert chosen(few, triton="cpu", cuda="cpu") is None
