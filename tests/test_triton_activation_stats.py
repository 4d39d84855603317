"""The Triton kernels of ActivationStats: the bits of the reference, on a GPU or in the interpreter."""

import pytest
import torch
from triton_interpreter import DEVICE, need_a_place_to_run

need_a_place_to_run()

from test_activation_stats import FULL, D, codes, same  # noqa: E402

import sae_kernels as sk  # noqa: E402
from sae_kernels.kernels import activation_stats as kernels  # noqa: E402
from sae_kernels.ops import _backend, _stats_gpu  # noqa: E402
from sae_kernels.ops.activation_stats import ActivationStats  # noqa: E402


@pytest.fixture(autouse=True)
def on_triton():
    with sk.backend("triton"):
        yield


def on_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def pair(batches, **settings):
    """The same batches through Triton and through the reference on the CPU."""
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
        (torch.bfloat16, torch.int32),
        (torch.float16, torch.int64),
    ],
)
def test_the_bits_of_the_reference(dtype, index_dtype):
    values, indices = codes(40, 9, dtype=dtype)
    values *= torch.logspace(-12, 2, 40)[:, None].to(dtype)
    values[::50, 3], values[::7, 2], values[3, 1] = torch.nan, -torch.inf, 2.0**22 if dtype != torch.float16 else 1
    indices = indices.to(index_dtype)
    mine, plain = pair([(values[:30], indices[:30]), (values[30:], indices[30:])], **FULL)
    assert same(mine, plain) and plain.rejected.sum() > 5 and plain.counts.min() > 0


def test_rounding_to_a_multiple_of_2_to_minus_64():
    """Ties to even, cancellation, the largest magnitudes, squares that lose bits in float64."""
    tiny = 2.0**-64
    values = [1e6, 2**-40, -1e6, 3 * tiny, -2 * tiny, 0.5 * tiny, 1.5 * tiny, 2.5 * tiny, -0.5 * tiny, 1 / 3, -1 / 7]
    values = torch.tensor(
        [*values, 2.0**22 - 2.0**-30, -(2.0**22) + 2.0**-30, 2.0**-32.5, 1 + 2.0**-50], dtype=torch.float64
    )
    mine, plain = pair([(values[:, None], torch.zeros(len(values), 1, dtype=torch.int32))] * 3)
    assert same(mine, plain) and mine.counts[0] == 3 * len(values)


def test_the_split_does_not_show():
    values, indices = codes(12, 6, seed=4)
    runs = []
    for cuts in ((0, 12), (0, 1, 8, 12)):
        stats = ActivationStats(D, device=DEVICE, **FULL)
        for a, b in zip(cuts[:-1], cuts[1:], strict=True):
            stats.update(*on_device(values[a:b], indices[a:b]))
        runs.append(stats)
    assert same(*runs)


@pytest.mark.parametrize("kept", [1, 3, 7, kernels.LARGEST_TOP + 1])
def test_top_examples(kept):
    """More candidates of a latent than are taken at once, many ties, ids given twice, batch upon batch."""
    g = torch.Generator().manual_seed(kept)
    batches = []
    for rows in (260, 9):
        values = torch.randint(-2, 6, (rows, 2), generator=g).float()
        latents = torch.stack([torch.full((rows,), 5), torch.randint(6, 9, (rows,), generator=g)], 1)
        batches.append((values, latents.int(), torch.randint(0, 40, (rows,), generator=g)))
    mine, plain = pair(batches, top=kept)
    assert same(mine, plain) and (plain.top_ids[5] >= 0).all() and (plain.top_ids[0] == -1).all()


def test_masked_rows_and_their_numbers():
    """Rows of a masked batch are counted on the device: later batches, ids and last_fired stand on that number."""
    values, indices = codes(30, 5, seed=2)
    mask = torch.rand(10, generator=torch.Generator().manual_seed(3)) < 0.5
    padded = indices.clone()
    padded[:10][~mask] = -1
    spoilt = values.clone()
    spoilt[:10][~mask] = torch.nan
    batches = [
        (spoilt[:10], padded[:10], None, mask),
        (values[10:20], indices[10:20]),
        (spoilt[:10], padded[:10], None, mask),
    ]
    mine, plain = pair([*batches, (values[20:], indices[20:], torch.arange(10) * 3)], **FULL, first_row=7)
    assert same(mine, plain) and mine.rows == plain.rows == 20 + 2 * int(mask.sum()) and mine.next_row == plain.next_row
    assert not mine.rejected.any()


def test_an_index_out_of_range_is_told_at_the_next_reading():
    values, indices = codes(8, 4)
    wrong = indices.long()
    wrong[2, 1], wrong[5, 3] = D, -(2**40)
    mine = ActivationStats(D, device=DEVICE, **FULL)
    mine.update(*on_device(values, wrong))
    with pytest.raises(ValueError, match=rf"\[0, d_sae = {D}\); 2 entries of the batches so far were not"):
        mine.state_dict()
    plain = ActivationStats(D, **FULL)
    with sk.backend("reference"):
        plain.update(torch.where((wrong < 0) | (wrong >= D), 0, values), indices)
    assert same(mine.to("cpu"), plain) and mine.rows == 8
    for read in ("rows", "sum", "sum_sq", "max", "dead_share", "density"):
        mine = ActivationStats(D, device=DEVICE)
        mine.update(*on_device(values, wrong))
        with pytest.raises(ValueError, match="2 entries"):
            getattr(mine, read)


def test_leading_dimensions_strides_empties_and_a_subset():
    values, indices = codes(24, 5)
    subset = {**FULL, "cooccurrence": torch.tensor([30, 2, 11, 5])}
    flat, plain = pair([(values, indices)], **subset)
    shaped = ActivationStats(D, device=DEVICE, **subset)
    shaped.update(*on_device(values.view(2, 3, 4, 5), indices.T.contiguous().T.view(2, 3, 4, 5)))
    for shape in ((0, 4), (3, 0)):
        empty = ActivationStats(D, device=DEVICE, **FULL)
        empty.update(torch.zeros(shape, device=DEVICE), torch.zeros(shape, dtype=torch.int64, device=DEVICE))
        assert empty.rows == shape[0] and not empty.counts.any() and (empty.top_ids == -1).all()
    assert same(flat, plain) and same(flat, shaped.to("cpu")) and flat.cooccurrence.sum() > 0


def test_pairs_of_long_rows():
    """More entries in a row than two tiles of pairs hold."""
    values, indices = codes(3, D, seed=6)
    mine, plain = pair([(values, indices)], cooccurrence=True)
    assert same(mine, plain)


def test_out_of_memory_leaves_the_state_as_it_was(monkeypatch):
    values, indices = codes(40, 5)
    mine, plain = pair([(values, indices)], **FULL)
    mine.to(DEVICE)

    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    for name in ("sort", "cumsum"):
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, name, full)
            with pytest.raises(torch.OutOfMemoryError):
                mine.update(*on_device(values, indices, None, torch.ones(40, dtype=torch.bool)))
    assert same(mine.to("cpu"), plain) and mine.rows == 40


def test_what_stands_in_for_a_kernel_that_does_not_build(monkeypatch):
    """Plain torch gives the same bits, masks and stray indices included."""
    values, indices = codes(30, 6, seed=9)
    indices[4, 4] = D + 3
    mask = torch.arange(30) % 3 > 0
    runs = []
    for broken in (None, "Triton cannot build"):
        monkeypatch.setattr(_backend, "_broken", broken)
        monkeypatch.setattr(_backend, "_forced", "auto" if broken else "triton")
        stats = ActivationStats(D, device=DEVICE, **FULL)
        for _ in range(2):
            stats._run_on_gpu(_stats_gpu.KERNELS["triton"], *on_device(values, indices, None, mask))
        with pytest.raises(ValueError, match="2 entries"):
            stats._read()
        runs.append(stats)
    assert same(*runs)


def test_nothing_waits_for_the_device(monkeypatch):
    values, indices = on_device(*codes(10, 6))
    mask = torch.ones(10, dtype=torch.bool, device=DEVICE)
    stats = ActivationStats(D, device=DEVICE, **FULL)
    stats.update(values, indices)
    with monkeypatch.context() as watched:
        for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "__index__"):
            watched.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
        stats.update(values, indices)
        stats.update(values, indices, None, mask)
        stats.update(values, indices)
    assert stats.rows == 40


if DEVICE == "cuda":

    def test_the_device_sees_no_waiting_either():
        values, indices = on_device(*codes(30, 6))
        mask = torch.ones(30, dtype=torch.bool, device=DEVICE)
        stats = ActivationStats(D, device=DEVICE, **FULL)
        stats.update(values, indices)
        torch.cuda.set_sync_debug_mode("error")
        try:
            stats.update(values, indices)
            stats.update(values, indices, None, mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert stats.rows == 90


def test_the_parts_that_the_number_of_rows_changes_are_not_specialised():
    for f, names in ((kernels.add_entries, ("entries", "row")), (kernels.count_bins, ("entries",))):
        listed = f.kwargs["do_not_specialize"] if hasattr(f, "kwargs") else f.do_not_specialize
        assert set(names) <= set(listed)
