"""Streams of activations: exact epochs, resumption, errors; statistics of codes; where recorded rows come from."""

import json
import threading

import pytest
import torch
from extract_models import D, Sequences, T, hidden, ids, real, run
from torch import nn

from sae_kernels import ActivationStats, TopKSAE
from sae_kernels.data.extract import ActivationStream, collect_stats
from sae_kernels.hooks import record
from sae_kernels.train import fit

pytestmark = pytest.mark.usefixtures("one_thread")


def test_stats_of_codes_from_the_store_and_without_a_disk(tmp_path):
    model, x, sae = Sequences(), ids(), TopKSAE(D, 32, 3)

    def counted(parts):
        stats = ActivationStats(32, top=4, histogram=True)
        for part in parts:
            with torch.no_grad():
                code = sae.encode(part)
            stats.update(code.values, code.indices)
        return list(stats.state_dict().values())

    batches = [hidden(model, part)[part != 0] for part in x.split(8)]
    store = run(model, "encoder", x, tmp_path / "s", mask=real, sae=sae)
    stored = list(store.stats(top=4, histogram=True).state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(stored, counted(batches), strict=True))
    with ActivationStream(model, "encoder", x, batch_size=8, batch_rows=13, mask=real, epochs=1) as stream:
        streamed = list(collect_stats(stream, sae, top=4, histogram=True).state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(streamed, counted(torch.cat(batches).split(13)), strict=True))
    with pytest.raises(ValueError, match="the stream has no end; give it epochs=1"):
        collect_stats(ActivationStream(model, "encoder", x), sae)


def test_stream_epochs_are_exact_and_it_resumes(tmp_path):
    model, x = Sequences(), ids()
    rows = hidden(model, x)[x != 0]
    settings = dict(batch_size=8, batch_rows=16, buffer_rows=64, mask=real, shuffle=4)

    def drawn(stream, n):
        return [next(stream) for _ in range(n)]

    with ActivationStream(model, "encoder", x, epochs=2, **settings) as stream:
        both = list(stream)
    half = len(both) // 2
    epochs = [torch.cat(both[:half]), torch.cat(both[half:])]
    for epoch in epochs:
        assert torch.equal(epoch[epoch[:, 0].argsort()], rows[rows[:, 0].argsort()])
    assert not torch.equal(*epochs) and {len(batch) for batch in both[: half - 1]} == {16}
    with ActivationStream(model, "encoder", x, **settings) as stream:
        drawn(stream, half + 3)
        state = json.loads(json.dumps(stream.state_dict()))
    with ActivationStream(model, "encoder", x, **settings) as stream:
        stream.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(drawn(stream, 5), both[half + 3 :], strict=False))


def test_stream_trains_an_sae_and_resumes_bit_for_bit(tmp_path):
    model, x = Sequences(), ids(100)

    def trained(path, **more):
        torch.manual_seed(0)
        sae = TopKSAE(D, 32, 4)
        options = dict(steps=40, log_every=10, decay=0, warmup=0, progress=False, checkpoint=path)
        with ActivationStream(model, "encoder", x, batch_rows=32, mask=real, shuffle=1) as stream:
            fit(sae, stream, **options, **more)
        return sae.state_dict()

    def stop(row):
        if row["step"] == 20:
            raise Stop

    whole = trained(tmp_path / "whole")
    with pytest.raises(Stop):
        trained(tmp_path / "cut", checkpoint_every=15, log=stop)
    resumed = trained(tmp_path / "cut", resume=True)
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


class Stop(Exception):
    pass


def test_stream_passes_errors_on_and_ends_its_thread(tmp_path):
    before = threading.active_count()
    model, x = Sequences(), ids()
    with pytest.raises(IndexError):
        next(ActivationStream(model, "encoder", x + 1000))
    with pytest.raises(ValueError, match="gave no row at all"):
        next(ActivationStream(model, "encoder", torch.zeros_like(x), mask=real))
    with ActivationStream(model, "encoder", x, ahead=1, batch_size=2, batch_rows=4) as stream:
        next(stream)
    assert threading.active_count() <= before
    with pytest.raises(ValueError, match="batch_rows must be at least 1, got 0"):
        ActivationStream(model, "encoder", x, batch_rows=0)
    again = nn.Sequential(*[nn.Linear(D, D)] * 2)  # one module, which runs twice
    with pytest.raises(ValueError, match="runs 2 times in one pass"):
        next(ActivationStream(again, "0", torch.randn(9, D)))


def test_record_says_where_rows_come_from_and_stops(tmp_path):
    model, x = Sequences(), ids()
    for positions, wanted in (("all", (x != 0).flatten().nonzero().squeeze(1)), ("last", torch.arange(50) * T + T - 1)):
        with record(model, "encoder", mask=real, positions=positions) as rec:
            model(x)
            model(x[:10])
        assert torch.equal(rec.places[: len(wanted)], wanted) and len(rec.places) == len(rec.activations)
        assert rec.leading_shapes == [(50, T), (10, T)]
        rec.clear()
        assert rec.leading_shapes == [] and len(rec.places) == 0
    model.after = 0
    with record(model, ["encoder", "embed"], stop=True) as rec:
        model(x)
        raise AssertionError("the block ends with the last of the modules")
    assert model.after == 0 and rec.activations.keys() == {"encoder", "embed"}
    assert torch.equal(rec.places["embed"], torch.arange(50 * T))
    with pytest.raises(ZeroDivisionError), record(model, "head", stop=True):
        raise ZeroDivisionError
