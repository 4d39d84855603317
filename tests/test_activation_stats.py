"""ActivationStats against dense fp64 and exact rational oracles; the same bits however split."""

import os
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_kernels import _native
from sae_kernels.ops import backend, reference_stats
from sae_kernels.ops.activation_stats import ActivationStats

D = 37
native = pytest.mark.skipif(not _native.cpu_loaded(), reason=f"native library: {_native.cpu_error}")
backends = pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=native)])
FULL = {"histogram": True, "top": 4, "cooccurrence": True}


def codes(rows, k, d_sae=D, dtype=torch.float32, seed=0):
    """About a third zeros, both signs, many ties, magnitudes from 2^-30 to 2^10; distinct indices in a row."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, k, generator=g, dtype=torch.float64)
    values *= 2.0 ** torch.randint(-30, 10, (rows, k), generator=g)
    ties = torch.randint(-1, 3, (rows, k), generator=g).double()
    values = torch.where(torch.rand(rows, k, generator=g) < 0.5, ties, values).to(dtype)
    return values, torch.rand(rows, d_sae, generator=g).argsort(1)[:, :k].to(torch.int32)


def dense(values, indices, d_sae=D):
    return torch.zeros(len(values), d_sae, dtype=torch.float64).scatter_(1, indices.long(), values.double())


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stats_of(values, indices, ids=None, **settings):
    stats = ActivationStats(D, **settings)
    stats.update(values, indices, ids)
    return stats


@backends
def test_hand_table(name):
    stats = ActivationStats(4, top=2, cooccurrence=True)
    with backend(name):
        stats.update(torch.tensor([[2.0, 1.0], [3.0, 0.0], [2.0, -0.5]]), torch.tensor([[1, 0], [1, 2], [1, 0]]))
    assert stats.rows == 3 and stats.dead_share == 0.5
    assert stats.counts.tolist() == [2, 3, 0, 0] and stats.last_fired.tolist() == [2, 2, -1, -1]
    assert stats.sum.tolist() == [0.5, 7, 0, 0] and stats.sum_sq.tolist() == [1.25, 17, 0, 0]
    assert stats.max.tolist() == [1, 3, 0, 0] and stats.mean.tolist() == [0.25, 7 / 3, 0, 0]
    assert stats.density.tolist() == [2 / 3, 1, 0, 0]
    assert stats.top_values[:2].tolist() == [[1, -0.5], [3, 2]] and stats.top_ids[:2].tolist() == [[0, 2], [1, 0]]
    assert stats.top_ids[2].tolist() == [-1, -1] and stats.top_values[2].tolist() == [-torch.inf] * 2
    assert stats.cooccurrence.tolist() == [[2, 2, 0, 0], [2, 3, 0, 0], [0] * 4, [0] * 4]


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_against_dense_oracle(name, dtype, index_dtype):
    values, indices = codes(300, 9, dtype=dtype)
    with backend(name):
        stats = stats_of(values, indices.to(index_dtype), **FULL)
    z = dense(values, indices)
    on = z != 0
    assert torch.equal(stats.counts, on.sum(0))
    assert torch.equal(stats.max, torch.where(on, z, -torch.inf).max(0).values)
    assert torch.equal(stats.last_fired, torch.where(on, torch.arange(300)[:, None], -1).max(0).values)
    assert torch.equal(stats.cooccurrence, (on.double().T @ on.double()).long())
    assert not stats.rejected.any()
    for f in range(D):
        rows = sorted((-z[r, f].item(), r) for r in on[:, f].nonzero().flatten().tolist())[:4]
        assert stats.top_values[f].tolist() == [-v for v, _ in rows]
        assert stats.top_ids[f].tolist() == [r for _, r in rows]
        exact = [Fraction(v) for v in z[:, f].tolist()]
        # each entry is rounded once, by at most 2^-65; the last rounding to float64 costs a few of its 2^-53
        for got, want in ((stats.sum[f], sum(exact)), (stats.sum_sq[f], sum(v * v for v in exact))):
            assert abs(Fraction(got.item()) - want) <= 300 * Fraction(1, 2**65) + abs(want) * Fraction(1, 2**50)


@backends
def test_sums_do_not_cancel(name):
    values = torch.tensor([1e6, 2**-40, -1e6, 3 * 2**-64, -(2**-63)], dtype=torch.float64).unsqueeze(1)
    with backend(name):
        stats = stats_of(values, torch.zeros(5, 1, dtype=torch.int64))
    assert stats.sum[0].item() == 2**-40 + 2**-64
    with backend(name):
        stats = stats_of(torch.tensor([[2.0**-66]] * 4 + [[-(2.0**-64)]], dtype=torch.float64), torch.zeros(5, 1).int())
    assert stats.sum[0].item() == -(2**-64) and stats.counts[0] == 5


@backends
@pytest.mark.parametrize("bound", [2.0**22, -(2.0**22)])
def test_large_sums_do_not_wrap(name, bound):
    value = torch.tensor(bound, dtype=torch.float64)
    value = torch.nextafter(value, torch.zeros_like(value))
    with backend(name):
        stats = stats_of(value.expand(300_000, 1), torch.zeros(300_000, 1).int())
        stats.merge(stats_of(value.expand(300_000, 1), torch.zeros(300_000, 1).int()))
    exact = Fraction(value.item())
    assert abs(Fraction(stats.sum[0].item()) / (600_000 * exact) - 1) < Fraction(1, 2**50)
    assert abs(Fraction(stats.sum_sq[0].item()) / (600_000 * exact**2) - 1) < Fraction(1, 2**50)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backends_give_the_same_bits(dtype):
    values, indices = codes(2000, 16, dtype=dtype, seed=3)
    values *= torch.logspace(-12, 3, 2000, dtype=dtype)[:, None]
    values[::50, 3], values[::70, 2] = torch.nan, -torch.inf
    states = []
    for name in ("reference", "cpu"):
        with backend(name):
            states.append(stats_of(values, indices, **FULL))
    assert same(*states) and states[0].rejected.sum() > 50


@native
def test_threads_do_not_show():
    values, indices = codes(20_000, 8, seed=4)
    states, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with backend("cpu"):
                states.append(stats_of(values, indices, **FULL))
    finally:
        torch.set_num_threads(before)
    assert same(states[0], states[1]) and same(states[0], states[2])


@backends
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_splits_and_merges_do_not_show(name, data):
    rows = data.draw(st.integers(0, 60))
    k = data.draw(st.integers(1, D))
    values, indices = codes(rows, k, seed=data.draw(st.integers(0, 999)))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=4)))
    pieces = list(zip([0, *cuts], [*cuts, rows], strict=True))
    with backend(name):
        whole, streamed = stats_of(values, indices, **FULL), ActivationStats(D, **FULL)
        shards = []
        for a, b in pieces:
            streamed.update(values[a:b], indices[a:b])
            shards.append(ActivationStats(D, **FULL, first_row=a))
            shards[-1].update(values[a:b], indices[a:b])
        merged = ActivationStats(D, **FULL)
        for shard in data.draw(st.permutations(shards)):
            merged.merge(shard)
    assert same(whole, streamed) and same(whole, merged)
    assert merged.rows == merged.next_row == rows


@backends
def test_leading_dimensions_strides_and_gradients(name):
    values, indices = codes(24, 5)
    with backend(name):
        flat = stats_of(values, indices, **FULL)
        shaped = stats_of(values.view(2, 3, 4, 5).requires_grad_(), indices.view(2, 3, 4, 5), **FULL)
        strided = stats_of(values.detach().T.contiguous().T, indices.repeat_interleave(2, 1)[:, ::2], **FULL)
        single = ActivationStats(D, **FULL)
        for row in range(24):
            single.update(values[row].detach(), indices[row])
    assert same(flat, shaped) and same(flat, strided) and same(flat, single)


@backends
def test_masked_rows_count_nowhere(name):
    values, indices = codes(40, 6)
    mask = torch.rand(4, 10, generator=torch.Generator().manual_seed(1)) < 0.6
    ids = torch.arange(40).view(4, 10) * 7
    padded = indices.view(4, 10, 6).clone()
    padded[~mask] = -1
    stats = ActivationStats(D, **FULL)
    with backend(name):
        stats.update(values.view(4, 10, 6), padded, ids, mask)
        expected = stats_of(values[mask.flatten()], indices[mask.flatten()], ids[mask], **FULL)
    assert same(stats, expected) and stats.rows == mask.sum() < 40


@backends
def test_ids_name_the_examples_and_break_ties(name):
    ids = torch.tensor([9, 4, 7, 4, 1], dtype=torch.int32)
    with backend(name):
        stats = stats_of(torch.tensor([[1.0], [1.0], [1.0], [2.0], [0.0]]), torch.full((5, 1), 3), ids, top=4)
    assert stats.top_ids[3].tolist() == [4, 4, 7, 9] and stats.top_values[3].tolist() == [2, 1, 1, 1]
    assert stats.last_fired[3] == 3


@backends
def test_a_lower_id_takes_the_last_place_of_an_equal_value(name):
    stats = ActivationStats(1, top=2)
    with backend(name):
        for first in (90, 50, 70, 10):
            stats.update(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), torch.tensor([first + 1, first]))
    assert stats.top_ids.tolist() == [[10, 11]]


def test_merging_shards_of_one_stream_keeps_their_row_numbers():
    first, second = ActivationStats(1), ActivationStats(1, first_row=10)
    first.update(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64))
    second.update(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64))
    first.merge(second)
    assert (first.rows, first.next_row, first.last_fired.item()) == (5, 12, 11)


@backends
def test_unusable_values_are_counted_apart(name):
    values = torch.tensor([[torch.nan, torch.inf, -torch.inf, 2.0**22, 1.0]])
    with backend(name):
        stats = stats_of(values, torch.arange(5).unsqueeze(0), **FULL)
    assert stats.rejected[:5].tolist() == [1, 1, 1, 1, 0] and stats.counts[:5].tolist() == [0, 0, 0, 0, 1]
    assert stats.sum.sum() == 1 and stats.cooccurrence.sum() == 1 and stats.histogram.sum() == 1
    assert (stats.top_ids[:4] == -1).all() and stats.rows == 1


@backends
def test_empty_batches(name):
    stats = ActivationStats(D, **FULL)
    with backend(name):
        stats.update(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.int64))
        stats.update(torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.int64))
    assert stats.rows == 3 and stats.counts.sum() == 0 and stats.dead_share == 1
    assert (stats.quantile(0.5) == 0).all() and (stats.max == 0).all() and (stats.density == 0).all()


@backends
@pytest.mark.parametrize("spec", [True, (-3, 2, 1), (-6, 4, 4)])
def test_histogram(name, spec):
    values, indices = codes(500, 9)
    with backend(name):
        stats = stats_of(values, indices, histogram=spec)
    edges, z = stats.bin_edges, dense(values, indices).abs()
    low, high, per_octave = (-20, 12, 8) if spec is True else spec
    assert edges[0] == 2.0**low and edges[-1] == 2.0**high and edges[per_octave] == 2.0 ** (low + 1)
    for f in range(D):
        counted = torch.bincount(torch.bucketize(z[:, f][z[:, f] != 0], edges, right=True), minlength=len(edges) + 1)
        assert torch.equal(stats.histogram[f], counted)


def test_quantiles_are_within_a_bin():
    g = torch.Generator().manual_seed(0)
    values = torch.rand(4000, 1, generator=g, dtype=torch.float64) * 8 + 0.01
    q = torch.tensor([0.0, 0.1, 0.5, 0.9, 0.99, 1.0], dtype=torch.float64)
    got = stats_of(values, torch.full((4000, 1), 5), histogram=(-10, 4, 16)).quantile(q)
    assert got.shape == (6, D) and (got[:, :5] == 0).all() and (got[:, 6:] == 0).all()
    exact = values.flatten().sort().values[(q * 3999).floor().long()]
    assert ((got[:, 5] - exact).abs() <= exact / 16).all()
    assert (got[:, 5].diff() >= 0).all()


def test_quantiles_are_linear_inside_a_bin():
    values = 1 + (torch.arange(1000, dtype=torch.float64).unsqueeze(1) + 0.5) / 1000
    stats = stats_of(values, torch.zeros(1000, 1, dtype=torch.int64), histogram=(-1, 3, 1))
    q = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(stats.quantile(q)[:, 0], 1 + (q * 999 + 0.5) / 1000, rtol=1e-14, atol=0)
    assert stats.quantile(0.5).shape == (D,) and stats.quantile(q.view(2, 2)).shape == (2, 2, D)


@backends
def test_cooccurrence_of_a_subset(name):
    values, indices = codes(200, 9)
    subset = torch.tensor([30, 2, 11, 5])
    with backend(name):
        stats = stats_of(values, indices, cooccurrence=subset)
    on = (dense(values, indices) != 0).double()[:, subset]
    assert torch.equal(stats.cooccurrence, (on.T @ on).long())
    assert stats.cooccurrence.diagonal().tolist() == stats.counts[subset].tolist()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"indices": torch.full((3, 2), D)}, ValueError, rf"must be in \[0, d_sae = {D}\), got values from {D}"),
        ({"indices": torch.tensor([[0, 1], [0, -1], [0, 1]])}, ValueError, "indices must be in .* from -1 to 1"),
        ({"indices": torch.zeros(3, 2)}, TypeError, "indices must be int32 or int64, got torch.float32"),
        ({"indices": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"values \(3, 2\) and indices \(3, 1\)"),
        ({"values": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "values must be float32"),
        ({"values": [[1.0]]}, TypeError, "values must be a tensor, got list"),
        ({"values": torch.ones(3, 2, device="meta")}, ValueError, "values is on meta and the state is on cpu"),
        ({"ids": torch.zeros(3)}, TypeError, "ids must be torch.int32 or torch.int64, got torch.float32"),
        ({"ids": torch.zeros(2, dtype=torch.int64)}, ValueError, r"ids must have one entry per row, .* got \(2,\)"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be torch.bool, got torch.float32"),
        ({"mask": torch.ones(3, 2, dtype=torch.bool)}, ValueError, "mask must have one entry per row"),
    ],
)
def test_bad_input_changes_nothing(change, error, match):
    batch = {"values": torch.ones(3, 2), "indices": torch.tensor([[0, 1]] * 3)}
    stats, untouched = stats_of(*codes(5, 3), **FULL), stats_of(*codes(5, 3), **FULL)
    with pytest.raises(error, match=match):
        stats.update(**{**batch, **change})
    assert same(stats, untouched)


def test_out_of_memory_leaves_the_state_as_it_was(monkeypatch):
    stats, untouched = (stats_of(*codes(30, 5), **FULL) for _ in range(2))
    monkeypatch.setattr(reference_stats, "cooccurrence", lambda *_: torch.empty(2**60))
    with backend("reference"), pytest.raises(RuntimeError, match="memory"):
        stats.update(*codes(30, 5, seed=1))
    assert same(stats, untouched)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"d_sae": 0}, ValueError, "d_sae must be between 1"),
        ({"d_sae": 2.0}, TypeError, "d_sae must be an int"),
        ({"top": -1}, ValueError, "top must be between 0"),
        ({"histogram": (2, 2, 4)}, ValueError, "high must be between 3"),
        ({"histogram": (0, 4, 3)}, ValueError, "per_octave must be a power of two, got 3"),
        ({"cooccurrence": torch.tensor([1, 1])}, ValueError, "cooccurrence must hold distinct latents"),
        ({"cooccurrence": torch.tensor([D])}, ValueError, r"distinct latents in \[0, 37\)"),
        ({"cooccurrence": torch.tensor([0.5])}, TypeError, "cooccurrence must be bool or an int32"),
        ({"cooccurrence": True, "d_sae": 30_000}, ValueError, "7.2 GB, more than the 4.3 GB .* at most 23170 latents"),
    ],
)
def test_bad_settings(settings, error, match):
    with pytest.raises(error, match=match):
        ActivationStats(**{"d_sae": D, **settings})


def test_quantile_and_merge_errors():
    plain, full = ActivationStats(D), ActivationStats(D, **FULL)
    with pytest.raises(ValueError, match="histogram=False"):
        plain.quantile(0.5)
    with pytest.raises(ValueError, match=r"q must be in \[0, 1\], got 1.5"):
        full.quantile(1.5)
    with pytest.raises(ValueError, match="unexpected keys .*'cooccurrence', 'histogram'"):
        plain.merge(full)
    with pytest.raises(ValueError, match=r"counts must be torch.int64 \(37,\), got torch.int64 \(38,\)"):
        plain.merge(ActivationStats(D + 1))
    with pytest.raises(ValueError, match="very object"):
        full.merge(full)
    with pytest.raises(ValueError, match=r"bins must be \[-4, 4, 2\], got \[-3, 5, 2\]"):
        ActivationStats(D, histogram=(-4, 4, 2)).merge(ActivationStats(D, histogram=(-3, 5, 2)))
    with pytest.raises(TypeError, match="other must be ActivationStats, got dict"):
        plain.merge({})


def test_saved_and_restored_state_goes_on(tmp_path):
    values, indices = codes(60, 7)
    subset = {**FULL, "cooccurrence": torch.tensor([4, 1])}
    stats = stats_of(values[:30], indices[:30], **subset)
    torch.save(stats.state_dict(), tmp_path / "stats.pt")
    restored = ActivationStats(D, **subset)
    restored.load_state_dict(torch.load(tmp_path / "stats.pt", weights_only=True))
    assert same(stats, restored)
    for s in (stats, restored):
        s.update(values[30:], indices[30:])
    assert same(stats, restored) and same(stats, stats_of(values, indices, **subset))
    state = stats.state_dict()
    state["extra"] = state.pop("counts")
    with pytest.raises(ValueError, match=r"missing keys \['counts'\], unexpected keys \['extra'\]"):
        restored.load_state_dict(state)


def _reduce(rank, folder, world):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    values, indices = codes(50, 7)
    part = slice(0, 20) if rank == 0 else slice(20, 50)
    stats = ActivationStats(D, **FULL, first_row=part.start)
    stats.update(values[part], indices[part])
    torch.save(stats.all_reduce().state_dict(), os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def test_all_reduce_is_the_merge_of_all(tmp_path):
    whole = stats_of(*codes(50, 7), **FULL)
    assert same(whole, stats_of(*codes(50, 7), **FULL).all_reduce())
    torch.multiprocessing.spawn(_reduce, (str(tmp_path), 2), nprocs=2)
    for rank in range(2):
        reduced = ActivationStats(D, **FULL)
        reduced.load_state_dict(torch.load(tmp_path / f"{rank}.pt"))
        assert same(whole, reduced)


def test_moving_keeps_everything():
    stats = stats_of(*codes(20, 5), **FULL)
    moved = stats_of(*codes(20, 5), **FULL).to("meta")
    assert {t.device.type for name, t in moved.state_dict().items() if name not in ("rows", "bins")} == {"meta"}
    assert same(stats, stats_of(*codes(20, 5), **FULL).to("cpu"))


@native
def test_opcheck():
    values, indices = codes(6, 4)
    stats, ids = ActivationStats(D, **FULL), torch.arange(6)
    ops = torch.ops.sae_kernels
    state = (stats.counts, stats._sums, stats._max, stats.last_fired, stats.rejected)
    torch.library.opcheck(ops.activation_stats_update, (values, indices, *state, 5))
    torch.library.opcheck(ops.activation_stats_histogram, (values, indices, stats.histogram, -20, 3))
    torch.library.opcheck(ops.activation_stats_top, (values, indices, ids, stats.top_values, stats.top_ids))
    torch.library.opcheck(ops.activation_stats_cooccurrence, (values, indices, None, stats.cooccurrence))
