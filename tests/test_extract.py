"""Extraction: the store holds what the module puts out, row for row, whatever the inputs, and says what is wrong."""

import itertools
import shutil
import warnings

import pytest
import torch
from extract_models import D, Flat, Sequences, T, hidden, ids, real, run, same
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from sae_kernels import TopKSAE
from sae_kernels.data.extract import CallableInputs, as_inputs, repair
from sae_kernels.data.store import ActivationStore

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_positions_and_ids_without_the_padding(tmp_path):
    model, x = Sequences(), ids()
    store = run(model, "encoder", x, tmp_path / "s", mask=real)
    assert len(store.shards) == 7, "a batch may take 8 * 6 rows of 44 bytes: more than a shard, so one to each"
    two = run(model, "encoder", x, tmp_path / "two", mask=real, shard_mb=0.005)
    assert len(two.shards) == 4 and same(two, store)
    assert torch.equal(store.read(slice(None)), hidden(model, x)[x != 0])
    place = torch.stack([store.read(slice(None), name).long() for name in ("row", "position")], 1)
    assert torch.equal(place, (x != 0).nonzero())
    torch.testing.assert_close(store.mean, hidden(model, x)[x != 0].double().mean(0))
    assert store.verify() == []


def test_the_pass_ends_at_the_module_and_the_model_is_left_as_it_was(tmp_path):
    model = Sequences().train()
    run(model, "encoder", ids(), tmp_path / "s", mask=real)
    assert model.after == 1, "the first batch alone runs through the head"
    assert model.training and not any(model.seen_training)
    assert not model.encoder._forward_hooks and not model._forward_pre_hooks


def test_every_mode_is_left_as_it_was(tmp_path):
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)).train()
    model[1].eval()
    run(model, "0", torch.randn(20, D), tmp_path / "s")
    assert model.training and model[0].training and not model[1].training


def test_flat_outputs_have_no_position(tmp_path):
    model, x = Flat(), torch.randn(21, D)
    store = run(model, "1", x, tmp_path / "s", first_id=100)
    assert list(store.fields) == ["x", "row"]
    with torch.no_grad():
        assert torch.equal(store.read(slice(None)), model[1](model[0](x)))
    assert torch.equal(store.read(slice(None), "row"), torch.arange(100, 121))


def test_last_position(tmp_path):
    model, x = Sequences(), ids()
    x[3] = 0
    store = run(model, "encoder", x, tmp_path / "s", mask=real, positions="last")
    kept = (x != 0).any(1)
    assert torch.equal(store.read(slice(None)), hidden(model, x)[kept, -1])
    assert torch.equal(store.read(slice(None), "row"), kept.nonzero().squeeze(1)) and "position" not in store.fields


class Table(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]


class Endless(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        yield from self.x


def parquet(tmp_path, x):
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'sae-kernels[data]'")
    import pyarrow.parquet as pq

    table = pa.table({"user": list(range(len(x))), "items": x.tolist(), "price": [0.5] * len(x)})
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=7)
    return tmp_path / "log.parquet"


SOURCES = {
    "tensor": lambda x, _: (x, {}),
    "tuple": lambda x, _: ((x, torch.ones(len(x), 1, 1)), {}),
    "dict": lambda x, _: ({"ids": x, "scale": torch.ones(len(x), 1, 1)}, {"mask": lambda ids, scale: ids != 0}),
    "dataset": lambda x, _: (Table(x), {}),
    "loader": lambda x, _: (DataLoader(Table(x), batch_size=8), {}),
    "loader with workers": lambda x, _: (DataLoader(Table(x), batch_size=8, num_workers=2), {}),
    "iterable loader": lambda x, _: (DataLoader(Endless(x), batch_size=8), {}),
    "list of batches": lambda x, _: (list(x.split(8)), {}),
    "iterator": lambda x, _: (iter(x.split(8)), {}),
    "callable": lambda x, _: (CallableInputs(lambda start, stop: x[start:stop], len(x), 8), {}),
    "parquet": lambda x, tmp_path: (
        parquet(tmp_path, x),
        {"columns": ["items"], "prepare": lambda columns: torch.tensor(columns["items"])},
    ),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_rows(tmp_path, kind):
    x = ids()
    wanted = run(Sequences(), "encoder", x, tmp_path / "wanted", mask=real)
    inputs, options = SOURCES[kind](x, tmp_path)
    store = run(Sequences(), "encoder", inputs, tmp_path / "s", **{"mask": real, **options})
    assert same(store, wanted)


def test_parquet_numbers_are_tensors(tmp_path):
    path = parquet(tmp_path, ids(20))
    first, *_, last = as_inputs(path, 6).read(itertools.count())
    assert torch.equal(first.value["user"], torch.arange(6)) and first.value["price"].dtype == torch.float64
    assert torch.equal(last.ids, torch.arange(18, 20)) and last.value["items"] == ids(20)[18:].tolist()


def test_dtype_and_autocast(tmp_path):
    model, x = Flat(), torch.randn(40, D)
    plain = run(model, "0", x, tmp_path / "plain")
    half = run(model, "0", x, tmp_path / "half", dtype=torch.bfloat16)
    cast = run(model, "0", x, tmp_path / "cast", autocast=torch.bfloat16)
    assert torch.equal(half.read(slice(None)), plain.read(slice(None)).bfloat16())
    assert cast.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cast.read(slice(None)), torch.cat([model[0](part) for part in x.split(8)]))


def test_shuffle_is_an_order_of_all_rows(tmp_path):
    model, x = Sequences(), ids(200)
    plain = run(model, "encoder", x, tmp_path / "plain", mask=real)
    one, again, two = (
        run(model, "encoder", x, tmp_path / str(i), mask=real, shuffle=seed, shard_mb=0.01)
        for i, seed in enumerate((1, 1, 2))
    )
    assert same(one, again) and not same(one, two) and not same(one, plain)

    def keys(store):
        return store.read(slice(None), "row") * T + store.read(slice(None), "position")

    order = keys(one).argsort()
    assert torch.equal(keys(one)[order], keys(plain))
    assert torch.equal(one.read(slice(None))[order], plain.read(slice(None)))
    inputs = one.shard(0)["row"].unique()
    assert inputs.diff().max() > 8, "a shard holds batches from far apart, not neighbours alone"
    assert not torch.equal(one.shard(0)["row"], one.shard(0)["row"].sort().values)


def test_a_finished_store_is_opened_and_more_inputs_are_appended(tmp_path):
    model, x, more = Sequences(), ids(), ids(30, seed=5)
    store = run(model, "encoder", x, tmp_path / "s", mask=real)
    model.after = 0
    assert same(run(model, "encoder", x, tmp_path / "s", mask=real), store)
    with pytest.raises(ValueError, match="holds other inputs.*content is .* append=True adds these"):
        run(model, "encoder", more, tmp_path / "s", mask=real, first_id=50)
    both = run(model, "encoder", more, tmp_path / "s", mask=real, first_id=50, append=True)
    all_at_once = hidden(model, torch.cat([x, more]))[torch.cat([x, more]) != 0]
    assert torch.equal(both.read(slice(None)), all_at_once) and both.read(slice(None), "row").max() == 79
    assert same(run(model, "encoder", more, tmp_path / "s", mask=real, first_id=50, append=True), both)


def test_another_model_module_or_dtype_never_touches_the_store(tmp_path):
    model, x = Sequences(), ids()
    run(model, "encoder", x, tmp_path / "s", mask=real)
    before = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    other = Sequences()
    with torch.no_grad():
        other.encoder.bias[2] += 1e-6
    sae = TopKSAE(D, 16, 2)
    cases = [
        (other, "encoder", {}, "weights is"),
        (model, "embed", {}, "module is encoder there and embed here"),
        (model, "encoder", {"dtype": torch.float16}, r"field x is float32 \[8\] there and float16 \[8\] here"),
        (model, "encoder", {"positions": "last"}, "field position is int32"),
        (model, "encoder", {"mask": None}, "mask is True there and False here"),
        (model, "encoder", {"nan": "keep"}, "nan is raise there and keep here"),
        (model, "encoder", {"sae": sae}, "kind is activations there and codes here"),
    ]
    for chosen, module, options, message in cases:
        for append in (False, True):
            with pytest.raises(ValueError, match=message):
                run(chosen, module, x, tmp_path / "s", append=append, **{"mask": real, **options})
    assert {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()} == before


def test_a_store_of_another_schema_is_never_touched(tmp_path):
    model, x = Sequences(), ids()
    run(model, "encoder", x, tmp_path / "s", mask=real)
    manifest = tmp_path / "s" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema": 1', '"schema": 2'))
    before = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    for use in (run, repair):
        for options in ({}, {"append": True}):
            with pytest.raises(ValueError, match="has schema 2; this version reads and writes 1"):
                use(model, "encoder", x, tmp_path / "s", mask=real, **options)
    assert {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()} == before


def test_repair_makes_the_damaged_shard_alone(tmp_path):
    model, x = Sequences(), ids()
    options = dict(mask=real, batch_size=8, shard_mb=1e-3, shuffle=3)
    run(model, "encoder", x, tmp_path / "s", **options)
    store = run(model, "encoder", ids(40, 9), tmp_path / "s", append=True, **options)
    whole = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    number = len(store.shards) - 2
    path = tmp_path / "s" / store.shards[number].name
    path.write_bytes(bytes([whole[path.name][0]]) + whole[path.name][1:-1] + bytes([whole[path.name][-1] ^ 4]))
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").iterdir()}
    with pytest.raises(ValueError, match=f"shard {number} is damaged and comes from other inputs than these"):
        repair(model, "encoder", x, tmp_path / "s", **options)
    assert repair(model, "encoder", ids(40, 9), tmp_path / "s", **options) == [number]
    assert {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()} == whole
    changed = [p.name for p in (tmp_path / "s").iterdir() if p.stat().st_mtime_ns != stamps[p.name]]
    assert changed == [path.name] and ActivationStore.open(tmp_path / "s").verify() == []
    assert repair(model, "encoder", x, tmp_path / "s", **options) == []
    path.unlink()
    with pytest.raises(ValueError, match="weights is"):
        repair(Flat(), "1", torch.randn(9, D), tmp_path / "s", **{**options, "mask": None})


def test_codes_of_an_sae_on_the_fly(tmp_path):
    model, x, sae = Sequences(), ids(), TopKSAE(D, 32, 3, normalize="standardize")
    acts = run(model, "encoder", x, tmp_path / "acts", mask=real)
    store = run(model, "encoder", x, tmp_path / "codes", mask=real, sae=sae)
    assert store.kind == "codes" and store.fields.keys() == {"values", "indices", "offset", "scale", "row", "position"}
    with torch.no_grad():
        wanted = sae(acts.read(slice(None)))
        torch.testing.assert_close(sae.decode(store.code(slice(None))), wanted, rtol=1e-6, atol=1e-6)
    small = run(model, "encoder", x, tmp_path / "half", mask=real, sae=sae, dtype=torch.bfloat16)
    assert torch.equal(small.read(slice(None)), store.read(slice(None)).bfloat16())
    with pytest.raises(ValueError, match="sae is"):
        run(model, "encoder", x, tmp_path / "codes", mask=real, sae=TopKSAE(D, 32, 3, normalize="standardize"))
    sae.refit = 4
    with pytest.raises(ValueError, match="refit is"):
        run(model, "encoder", x, tmp_path / "codes", mask=real, sae=sae)
    other = run(model, "encoder", x, tmp_path / "refit", mask=real, sae=sae)
    chosen = (s.read(slice(None), "indices").sort(1).values for s in (other, store))
    assert torch.equal(*chosen)
    assert not torch.equal(other.read(slice(None)), store.read(slice(None)))


def test_codes_under_a_global_normaliser_decode(tmp_path):
    model, x, sae = Flat(), torch.randn(60, D), TopKSAE(D, 32, 3, normalize="global")
    with torch.no_grad():
        sae.fit_normalizer(model[0](x))
        store = run(model, "0", x, tmp_path / "s", sae=sae)
        torch.testing.assert_close(sae.decode(store.code(slice(None))), sae(model[0](x)), rtol=1e-6, atol=1e-6)


def test_rows_that_are_not_finite(tmp_path):
    model, x = Sequences(), ids()
    with torch.no_grad():
        model.embed.weight[7] = float("nan")
    bad = ((x == 7) & (x != 0)).nonzero()
    with pytest.raises(FloatingPointError, match=rf"the first is of input {bad[0, 0]}, position {bad[0, 1]}; nan="):
        run(model, "encoder", x, tmp_path / "raise", mask=real)
    with pytest.raises(ValueError, match="is not finished"):
        ActivationStore.open(tmp_path / "raise")
    dropped = run(model, "encoder", x, tmp_path / "drop", mask=real, nan="drop")
    kept = run(model, "encoder", x, tmp_path / "keep", mask=real, nan="keep")
    assert sum(shard.dropped for shard in dropped.shards) == len(bad) == kept.rows - dropped.rows
    good = hidden(model, x)[(x != 0) & (x != 7)]
    assert torch.equal(dropped.read(slice(None)), good)
    torch.testing.assert_close(kept.mean, good.double().mean(0))
    assert int((~kept.read(slice(None)).isfinite()).any(1).sum()) == len(bad)
    # a sum that overflows is no NaN
    with torch.no_grad():
        model.embed.weight[7] = 0
        model.encoder.weight.mul_(0), model.encoder.bias.fill_(3e38)
    assert run(model, "encoder", x, tmp_path / "large", mask=real).rows == int((x != 0).sum())


def test_bad_input_is_told_first(tmp_path, monkeypatch):
    model, x = Sequences(), ids()

    def refused(message, *args, error=ValueError, **options):
        with pytest.raises(error, match=message):
            run(*(args or (model, "encoder", x)), tmp_path / "s", **options)
        assert not (tmp_path / "s").exists()

    refused("has no module 'encodr'; nearest: 'encoder'", model, "encodr", x)
    refused("the output is a tuple without a tensor|expected a tensor", Odd(), "inner", x, error=TypeError)
    refused("the output must be a floating tensor", Odd(), "whole", x, error=TypeError)
    refused("runs 2 times in one pass", Odd(), "twice", x)
    refused("never ran", Odd(), "idle", x, error=RuntimeError)
    refused(r"puts out \[6, 50, d\] for 50 inputs|puts out \[6, 8, d\] for 8 inputs", Odd(), "turned", x)
    refused("the model is on the meta device", nn.Sequential(nn.Linear(D, D, device="meta")), "0", x)
    refused("device is meta and the model is on cpu; move it", device="meta")
    if not torch.cuda.is_available():
        refused("device is cuda and there is no CUDA device here", device="cuda")
    refused("engine must be one of local, torchrun, ray, got 'slurm'", engine="slurm")
    refused("nan must be one of raise, drop, keep, got 'skip'", nan="skip")
    refused("dtype must be one of .*, got torch.int8", dtype=torch.int8)
    refused("shard_mb must be above 0, got 0", shard_mb=0)
    refused("writers must be at least 1, got 0", writers=0)
    refused("batch_size must be an int of at least 1, got 0", batch_size=0)
    refused("inputs must have one length of at least 1, got lengths \\[0\\]", model, "encoder", x[:0])
    refused("got lengths \\[3, 4\\]", model, "encoder", (x[:3], x[:4]))
    refused("inputs are empty", model, "encoder", [])
    refused("inputs must be tensors, a DataLoader", model, "encoder", 7, error=TypeError)
    refused("this DataLoader shuffles", model, "encoder", DataLoader(Table(x), shuffle=True))
    refused("columns are those of a .parquet file, got Tensor", columns=["a"])
    refused("no such file", model, "encoder", tmp_path / "none.parquet", error=FileNotFoundError)
    refused("column 'titles' is missing", model, "encoder", parquet(tmp_path, x), columns=["titles"])
    refused("model must be an nn.Module or make one, got int", lambda: 3, "encoder", x, error=TypeError)
    refused("start it with torchrun", engine="torchrun")
    with pytest.raises(TypeError, match="extract has no argument 'colour'"):
        repair(model, "encoder", x, tmp_path / "s", colour=3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, (16 << 20) + 100))
    with pytest.raises(OSError, match="100 bytes are free and about [0-9,]+ are to come; nothing was added"):
        run(model, "encoder", x, tmp_path / "s")
    assert not list((tmp_path / "s").glob("shard*"))


class Odd(nn.Module):
    """Modules whose outputs are of no use."""

    def __init__(self):
        super().__init__()
        self.inner, self.whole, self.idle, self.turned = (
            Gives(("a", 3)),
            Gives(torch.arange(3)),
            nn.ReLU(),
            nn.Identity(),
        )
        self.twice = nn.Linear(D, D)

    def forward(self, ids):
        self.inner(ids), self.whole(ids)
        x = self.twice(self.twice(torch.zeros(len(ids), D)))
        self.turned(torch.zeros(T, len(ids), D))
        return x


class Gives(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, _):
        return self.what


def test_what_is_shown(tmp_path, capsys):
    x = ids()
    store = run(Sequences(), "encoder", x, tmp_path / "s", mask=real, progress=True)
    err = capsys.readouterr().err
    assert "about " in err and f"in {len(store.shards)} shards" in err and "x float32 [8]" in err
    assert "rows/s=" in err and "MB/s=" in err and "7/7" in err
    run(Sequences(), "encoder", x, tmp_path / "t", mask=real)
    assert capsys.readouterr().err == ""


def test_no_warnings(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(Sequences(), "encoder", ids(), tmp_path / "s", mask=real, shuffle=1).rows
