"""The shuffled reader: exact epochs, a shuffle that passes its statistics, positions, parts, workers, wrong inputs."""

import ctypes
import itertools
import mmap
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from sae_kernels import _native
from sae_kernels._seed import mix_seed
from sae_kernels.data import _shard_rows
from sae_kernels.data import reader as reader_module
from sae_kernels.data.reader import ShuffledReader
from sae_kernels.data.store import ActivationStore, RowWriter
from sae_kernels.nn.sae import TopKSAE
from sae_kernels.train import fit

ROWS = 1013  # prime: nothing divides evenly
SMALL = {"buffer_rows": 256, "piece_rows": 7, "lanes": 4}


def write(path, rows, shard_rows, d=3, dtype=torch.float32):
    """A store whose row i holds i + j/8 in column j."""
    with RowWriter(path, d, dtype, shard_rows=shard_rows) as writer:
        writer.add((torch.arange(rows)[:, None] + torch.arange(d) / 8).to(dtype))
    return ActivationStore.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write(tmp_path_factory.mktemp("store") / "acts", ROWS, 97)


def drawn(reader, batches):
    """The numbers of the rows of so many batches, each row checked to be whole."""
    x = torch.cat([reader.next() for _ in range(batches)])
    assert torch.equal(x, x[:, :1] + torch.arange(3) / 8)
    return x[:, 0].long()


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(
    "options", [SMALL, {}, {"buffer_rows": 1, "piece_rows": 1, "lanes": 1}, {"piece_rows": 10_000}]
)
def test_every_epoch_gives_every_row_once(store, workers, options):
    rows = drawn(ShuffledReader(store, 64, workers=workers, **options), 3 * ROWS // 64 + 1)
    epochs = rows[: 3 * ROWS].reshape(3, ROWS)
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(ROWS))
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_order_depends_on_the_seed_and_not_on_the_workers(store):
    first, again, threads, other = (
        drawn(ShuffledReader(store, 64, workers=workers, seed=seed, **SMALL), 20)
        for workers, seed in ((0, 1), (0, 1), (3, 1), (0, 2))
    )
    assert torch.equal(first, again) and torch.equal(first, threads) and not torch.equal(first, other)


def order_of_epoch(rows, shard_rows, seed, buffer_rows, piece_rows, lanes):
    """The order as the class describes it, row by row."""

    def shuffled(items, seed):
        return [items[i] for i in torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()]

    shards = [range(first, min(first + shard_rows, rows)) for first in range(0, rows, shard_rows)]
    pieces = [shard[i : i + piece_rows] for shard in shards for i in range(0, len(shard), piece_rows)]
    sequence = itertools.chain.from_iterable(shuffled(pieces, seed))
    lane_rows = [iter(list(itertools.islice(sequence, len(range(lane, rows, lanes))))) for lane in range(lanes)]
    order = {}
    for start, lane in itertools.product(range(0, rows, buffer_rows), range(lanes)):
        places = [place for place in range(start, min(start + buffer_rows, rows)) if place % lanes == lane]
        order.update(zip(shuffled(places, mix_seed(seed, start * lanes + lane)), lane_rows[lane], strict=False))
    return [order[place] for place in range(rows)]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        SMALL,
        {"buffer_rows": 64, "piece_rows": 1, "lanes": 16},
        {"buffer_rows": 320, "piece_rows": 97, "lanes": 1},
    ],
)
def test_the_order_is_the_one_described(store, options, native, monkeypatch):
    monkeypatch.setattr(_native, "cpu_loaded", lambda: native and _native.cpu_error is None)
    epochs = [order_of_epoch(ROWS, 97, mix_seed(5, epoch), **options) for epoch in range(2)]
    found = drawn(ShuffledReader(store, 64, seed=5, **options), 2 * ROWS // 64)
    assert found.tolist() == sum(epochs, [])[: len(found)]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("width", [1, 12, 64, 200, 256])
@pytest.mark.parametrize("begin", [0, 8])  # 0: rows of 64 and 256 bytes are whole cache lines
def test_rows_of_spans_go_to_their_places(width, begin, native, monkeypatch):
    monkeypatch.setattr(_native, "cpu_loaded", lambda: native and _native.cpu_error is None)
    g = torch.Generator().manual_seed(width)
    shards = [torch.randint(256, (rows, width), generator=g, dtype=torch.uint8) for rows in (50, 7, 50)]
    spans = torch.tensor([[3, 40], [0, 7], [50, 0]])
    order = torch.randperm(47, generator=g)
    memory = torch.zeros(3 * 47 * width + begin, dtype=torch.uint8)[begin:].view(47, 3, width)
    _shard_rows.scatter(shards, spans, order, memory[:, 1])
    expected = torch.zeros_like(memory)
    expected[order, 1] = torch.cat([shards[0][3:43], shards[1]])
    assert torch.equal(memory, expected)


@pytest.mark.skipif(not _native.cpu_loaded(), reason=f"native library: {_native.cpu_error}")
def test_the_kernel_leaves_memory_that_is_not_its_own():
    shard, out = torch.zeros(5, 8, dtype=torch.uint8), torch.zeros(2, 8, dtype=torch.uint8)
    for spans, order, what in (
        ([[4, 2]], [0, 1], "a span is outside of its shard"),
        ([[-1, 2]], [0, 1], "a span is outside of its shard"),
        ([[0, 3]], [0, 1], "more rows than places"),
        ([[0, 2]], [0, 2], "order is not one of out's rows"),
        ([[0, 2]], [-1, 0], "order is not one of out's rows"),
        ([[0, 1], [1, 1]], [0, 1], "each span needs its shard"),
    ):
        with pytest.raises(RuntimeError, match=what):
            _shard_rows.scatter([shard], torch.tensor(spans), torch.tensor(order), out)
    with pytest.raises(RuntimeError, match="or of other rows"):
        _shard_rows.scatter([shard], torch.tensor([[0, 2]]), torch.tensor([0, 1]), out[:, :4])


def in_memory(row):
    """Whether the page that a row of a mapped file begins on is in memory: mincore(2)."""
    there = ctypes.create_string_buffer(1)
    page = row.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(page), ctypes.c_size_t(1), there) == 0
    return there.raw[0] & 1 == 1


@pytest.mark.skipif(not hasattr(os, "posix_fadvise") or not _native.cpu_loaded(), reason="needs Linux and the library")
@pytest.mark.parametrize("told", [True, False])
def test_spans_that_are_asked_for_come_into_memory(tmp_path, told):
    store = write(tmp_path / "acts", 4096, 4096, d=256)  # 4 MiB
    path = Path(store.url) / store.shards[0].name
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    shard = _shard_rows.mapped(path)
    if in_memory(shard[2048]):
        pytest.skip("this file system keeps files in memory")
    _shard_rows.ask([shard, shard], torch.tensor([[1024, 512], [3072, 256]]), told)
    deadline = time.monotonic() + 30
    while not all(in_memory(shard[row]) for row in (1024, 1300, 1530, 3080, 3320)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert not any(in_memory(shard[row]) for row in (500, 1000, 1560, 2600, 3040, 3350))


def test_a_reader_that_would_wait_helps_its_worker(store, monkeypatch):
    both, scatter = threading.Barrier(2, timeout=30), _shard_rows.scatter

    def meet(*job):
        both.wait()
        scatter(*job)

    monkeypatch.setattr(_shard_rows, "scatter", meet)
    rows = drawn(ShuffledReader(store, 64, workers=1, **SMALL), 4)
    both.abort()
    monkeypatch.setattr(_shard_rows, "scatter", scatter)
    assert torch.equal(rows, drawn(ShuffledReader(store, 64, workers=0, **SMALL), 4))


def test_bfloat16_rows_come_as_stored(tmp_path):
    store = write(tmp_path / "acts", 200, 64, d=5, dtype=torch.bfloat16)
    batch = ShuffledReader(store, 200, workers=0).next()
    assert batch.dtype == torch.bfloat16
    assert torch.equal(batch[batch[:, 0].argsort(stable=True)][:, 0], store.read(slice(0, 200))[:, 0])


@pytest.mark.parametrize("size", [1, 3, 2000])
def test_batches_of_any_size(store, size):
    reader = ShuffledReader(store, size, workers=0, **SMALL)
    rows = torch.cat([drawn(reader, 1) for _ in range(2 * ROWS // size + 2)])
    assert torch.equal(rows[:ROWS].sort().values, torch.arange(ROWS))


@pytest.mark.parametrize("at", [0, 5, 16, 40])
def test_a_resumed_order_is_the_uninterrupted_one(store, at):
    whole, cut, resumed = (ShuffledReader(store, 64, **SMALL) for _ in range(3))
    rows = drawn(whole, 60).reshape(60, 64)
    for _ in range(at):
        cut.next()
    resumed.load_state_dict(cut.state_dict())
    assert torch.equal(drawn(resumed, 60 - at).reshape(-1, 64), rows[at:])
    whole.load_state_dict({"drawn": 64})
    assert torch.equal(drawn(whole, 3).reshape(3, 64), rows[1:4])


@pytest.mark.parametrize("parts, times", [(2, 1), (4, 1), (3, 3), (6, 3), (8, 2)])
def test_parts_share_the_batches(store, parts, times, monkeypatch):
    read, pieces = [], reader_module._Epoch.pieces

    def counted(self, *job):
        found = pieces(self, *job)
        read.append(sum(int(spans[:, 1].sum()) for _, spans in found))
        return found

    whole = ShuffledReader(store, 64, workers=0, **SMALL)
    rows = drawn(whole, ROWS // 64)
    monkeypatch.setattr(reader_module._Epoch, "pieces", counted)
    shared = []
    for part in range(parts):
        reader = ShuffledReader(store, 64, workers=0, **SMALL)
        reader.split(part, parts)
        shared.append(drawn(reader, ROWS // 64))
    for part, found in enumerate(shared):
        assert torch.equal(found, rows[part::parts])
    assert sum(read) == times * ROWS  # where parts divides the 4 lanes no row is read twice


def test_any_number_of_parts_goes_on_where_another_stopped(store):
    rows = drawn(ShuffledReader(store, 64, workers=0), 40).reshape(40, 64)
    for parts in (3, 32, 64):
        found = []
        for part in range(parts):
            first, reader = (ShuffledReader(store, 64, workers=0) for _ in range(2))
            first.split(part, parts)
            drawn(first, 13)
            reader.split(part, parts)
            reader.load_state_dict(first.state_dict())
            found.append([drawn(reader, 1) for _ in range(27)])
        # over the end of the first epoch: each batch is what one process gets, dealt to the parts
        for batch, shares in zip(rows[13:], zip(*found, strict=True), strict=True):
            assert torch.equal(torch.cat(shares).sort().values, batch.sort().values)


def test_batches_that_are_kept_stay_as_they_were(store):
    reader = ShuffledReader(store, 64, **SMALL)
    kept = [reader.next() for _ in range(40)]
    copies = [batch.clone() for batch in kept]
    for _ in range(40):
        reader.next()
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_memory_of_used_buffers_is_used_again(tmp_path):
    reader = ShuffledReader(write(tmp_path / "acts", 1024, 100), 64, workers=0, **SMALL)
    assert len({reader.next().untyped_storage().data_ptr() for _ in range(64)}) == 1


def test_a_batch_over_two_buffers_holds_neither(store):
    reader = ShuffledReader(store, 64, workers=0, **SMALL)
    for _ in range(64):  # ROWS is prime: from the second epoch on, batches lie across the ends of buffers
        reader.next()
    assert len(reader._buffers) == 1


def test_close_lets_go_and_batches_stay(store):
    reader = ShuffledReader(store, 64, workers=2, **SMALL)
    batch = reader.next()
    copy, threads = batch.clone(), list(reader._workers._threads)
    reader.close()
    assert threads and not any(thread.is_alive() for thread in threads)
    assert torch.equal(batch, copy) and not reader._buffers and not reader._shards


def test_shuffle_statistics(tmp_path):
    """Against what random pieces, mixed within a buffer, must give; 5 sigma, fixed seeds."""
    rows, batch, buffer, piece = 16384, 64, 1024, 8
    store = write(tmp_path / "acts", rows, 1000)
    reader = ShuffledReader(store, batch, buffer_rows=buffer, piece_rows=piece, lanes=4, workers=0)
    epochs = 8
    order = torch.cat([reader.next()[:, 0] for _ in range(epochs * rows // batch)]).double()
    # means of batches, the first one of each buffer: their variance is that of the rows, over the rows of a batch and
    # over the pieces of a buffer
    firsts = order.reshape(-1, buffer)[:, :batch].mean(1)
    spread = (rows**2 - 1) / 12
    ratio = float((firsts - (rows - 1) / 2).square().mean() / (spread * (1 / batch + piece / buffer)))
    assert abs(ratio - 1) < 5 * (2 / len(firsts)) ** 0.5
    # where a row stands in its buffer does not tell its place in its piece: chi-squared of the 8 x 8 table
    place = torch.arange(buffer).repeat(len(order) // buffer) * 8 // buffer
    table = torch.bincount((order.long() % 1000 % piece) * 8 + place, minlength=64).reshape(8, 8).double()
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    chi = float(((table - expected).square() / expected).sum())
    assert abs(chi - 49) < 5 * (2 * 49) ** 0.5
    # nor does the place in the store tell the place in the epoch: pieces are the independent draws
    position = torch.arange(rows).double().repeat(epochs)
    correlation = float(torch.corrcoef(torch.stack([order, position]))[0, 1])
    assert abs(correlation) < 5 / (epochs * rows / piece) ** 0.5
    # neighbours of the store are no neighbours in the order: among 16384 per epoch, 2 in expectation by chance
    assert int((order.diff().abs() == 1).sum()) < 100 * epochs


def test_a_store_behind_a_url_is_read_shard_by_shard(tmp_path, store):
    pytest.importorskip("fsspec")
    path = f"memory://{tmp_path.name}"
    with RowWriter(path, 3, shard_rows=97) as writer:
        writer.add(store.read(slice(0, ROWS)))
    reader = ShuffledReader(ActivationStore.open(path), 64, lanes=4)
    assert reader.piece_rows == 97
    rows = drawn(reader, 2 * ROWS // 64 + 1)[: 2 * ROWS].reshape(2, ROWS)
    for epoch in rows:
        assert torch.equal(epoch.sort().values, torch.arange(ROWS))
    assert not torch.equal(*rows)


def activations(d=8):
    g = torch.Generator().manual_seed(3)
    atoms = torch.nn.functional.normalize(torch.randn(16, d, generator=g), dim=1)
    return (torch.rand(300, 16, generator=g) * (torch.rand(300, 16, generator=g) < 0.15)) @ atoms


def trained(path, **options):
    sae = TopKSAE(8, 32, 4, generator=torch.Generator().manual_seed(1), dead_after=100)
    reader = ShuffledReader(ActivationStore.open(path), 32, buffer_rows=64, piece_rows=7, lanes=4, workers=1)
    fit(sae, reader, steps=15, log_every=5, progress=False, **options)
    return sae


def test_training_from_a_store_resumes_bit_for_bit(tmp_path):
    with RowWriter(tmp_path / "acts", 8, shard_rows=70) as writer:
        writer.add(activations())

    def kill(row):
        if row["step"] == 10:
            raise InterruptedError

    whole = trained(tmp_path / "acts")
    with pytest.raises(InterruptedError):
        trained(tmp_path / "acts", checkpoint=tmp_path / "run", checkpoint_every=7, log=kill)
    resumed = trained(tmp_path / "acts", checkpoint=tmp_path / "run", resume=True)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())
    with RowWriter(tmp_path / "other", 8, shard_rows=71) as writer:
        writer.add(activations())
    with pytest.raises(ValueError, match="source was 'store [0-9a-f]{12}, 300 rows"):
        trained(tmp_path / "other", checkpoint=tmp_path / "run", resume=True)


def _rank(rank, size, path):
    sae = trained(f"{path}/acts", group=torch.distributed.group.WORLD)
    if rank == 0:
        torch.save(sae.state_dict(), f"{path}/found.pt")


def test_two_processes_read_a_store_as_one(tmp_path):
    with RowWriter(tmp_path / "acts", 8, shard_rows=70) as writer:
        writer.add(activations())
    run_ranks(2, tmp_path, _rank, str(tmp_path))
    whole, found = trained(tmp_path / "acts").state_dict(), torch.load(tmp_path / "found.pt")
    assert max((whole[key].double() - found[key].double()).abs().max().item() for key in whole) < 1e-5


def test_wrong_inputs(store, tmp_path):
    for name, value in (("batch_size", 0), ("lanes", 0), ("workers", -1), ("buffer_rows", 0), ("piece_rows", 1.5)):
        least = 0 if name == "workers" else 1
        with pytest.raises(ValueError, match=f"{name} must be an int of at least {least}, got {value}"):
            ShuffledReader(store, **{"batch_size": 8, name: value})
    with pytest.raises(ValueError, match="batch_size 8 is too small for 9 processes"):
        ShuffledReader(store, 8, lanes=4).split(0, 9)
    with pytest.raises(ValueError, match="part 2 of 2"):
        ShuffledReader(store, 8, lanes=4).split(2, 2)
    with RowWriter(tmp_path / "none", 3):
        pass
    with pytest.raises(ValueError, match="the store is empty"):
        ShuffledReader(ActivationStore.open(tmp_path / "none"), 8)
    broken = write(tmp_path / "broken", 200, 50)
    (tmp_path / "broken" / broken.shards[2].name).unlink()
    with pytest.raises(FileNotFoundError):
        drawn(ShuffledReader(broken, 200, workers=1), 1)


def test_a_damaged_shard_is_named(tmp_path):
    store = write(tmp_path / "acts", 200, 50)
    file = tmp_path / "acts" / store.shards[1].name
    whole = file.read_bytes()
    for bad, why in (
        (b"", "Expecting value"),
        (whole[:-1], "smaller than the required"),
        (b"\xff" * 100, "cannot fit"),
        (whole.replace(b'"x"', b'"y"', 1), "'x'"),
    ):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=f"{file.name} is damaged: .*{why}"):
            drawn(ShuffledReader(store, 200, workers=0), 1)
