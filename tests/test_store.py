"""The activation store: what is written is what is read, damage is named, nothing foreign is touched."""

import hashlib
import json
import os
import shutil
import threading
import urllib.request
from pathlib import Path

import pytest
import torch

from sae_kernels.data.store import ActivationStore, RowWriter, StoreWriter
from sae_kernels.data.store.manifest import Field
from sae_kernels.data.store.moments import BLOCK, Moments

D = 12


def rows(n=1000, dtype=torch.float32, seed=0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def written(path, x, **options):
    with RowWriter(path, D, x.dtype, **{"shard_rows": 300, **options}) as writer:
        for part in x.split(77):
            writer.add(part)
    return writer.store


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_come_back_bit_for_bit(tmp_path, dtype):
    x = rows(dtype=dtype)
    store = written(tmp_path / "s", x)
    assert ActivationStore.open(tmp_path / "s").manifest == store.manifest
    assert (store.rows, store.d, store.dtype, store.kind) == (1000, D, dtype, "activations")
    assert [shard.rows for shard in store.shards] == [300, 300, 300, 100]
    assert torch.equal(store.read(slice(None)), x)
    assert torch.equal(store.read(slice(None), "row"), torch.arange(1000))
    some = torch.tensor([999, 0, 300, 299, 299, 650])
    assert torch.equal(store.read(some), x[some]) and torch.equal(store.read(some.tolist()), x[some])
    for part in (slice(290, 910), slice(300, 600), slice(5, 5), slice(900, 10, -7), slice(-3, None), slice(9, 3)):
        assert torch.equal(store.read(part), x[torch.arange(1000)[part] if part.step != -7 else range(900, 10, -7)])
    assert store.read([]).shape == (0, D)
    assert store.verify() == []


def test_shards_are_plain_safetensors_and_memory_mapped(tmp_path):
    from safetensors.torch import load_file

    store = written(tmp_path / "s", rows())
    name = store.shards[1].name
    assert torch.equal(load_file(tmp_path / "s" / name)["x"], rows()[300:600])
    held = store.shard(1)
    assert name in Path("/proc/self/maps").read_text()
    assert held["x"].data_ptr() % 8 == 0


def test_the_files_are_the_rows_and_little_else(tmp_path):
    x = torch.randn(20_000, 64)
    with RowWriter(tmp_path / "s", 64, shard_rows=5000) as writer:
        writer.add(x)
    payload = x.nbytes + 8 * len(x)
    on_disk = sum(p.stat().st_size for p in (tmp_path / "s").iterdir())
    assert payload <= on_disk <= 1.01 * payload
    assert writer.store.bytes == sum(p.stat().st_size for p in (tmp_path / "s").glob("*.safetensors"))


def test_positions_and_own_ids(tmp_path):
    ids, place = torch.arange(10).repeat_interleave(5) * 7, torch.arange(5, dtype=torch.int32).repeat(10)
    with RowWriter(tmp_path / "s", D, position=True, shard_rows=20) as writer:
        writer.add(rows(50), ids, place)
    assert torch.equal(writer.store.read(slice(0, 50), "row"), ids)
    assert torch.equal(writer.store.read(slice(0, 50), "position"), place)


def test_statistics_are_those_of_all_rows(tmp_path):
    x = rows(3 * (BLOCK // D) + 5) * torch.logspace(-3, 6, D) + 1e3
    store = written(tmp_path / "s", x, shard_rows=BLOCK // D + 1)
    # a mean of n numbers carries n roundings at most
    torch.testing.assert_close(store.mean, x.double().mean(0), rtol=len(x) * 2**-53, atol=0)
    # and a variance those of a mean 10^6 standard deviations away
    torch.testing.assert_close(store.var, x.double().var(0, correction=0), rtol=1e-9, atol=0)
    again = ActivationStore.open(tmp_path / "s")
    assert torch.equal(again.mean, store.mean) and torch.equal(again.var, store.var)


def test_statistics_leave_out_rows_that_are_not_finite(tmp_path):
    x = rows()
    good = x.clone()
    x[3, 5], x[700, 0] = float("nan"), float("inf")
    keep = torch.ones(1000, dtype=torch.bool)
    keep[[3, 700]] = False
    store = written(tmp_path / "s", x)
    torch.testing.assert_close(store.mean, good[keep].double().mean(0), rtol=1e-13, atol=1e-16)
    assert store.manifest.moments.rows == 998
    assert Moments.of(torch.full((4, 2), torch.nan)).rows == 0
    assert torch.equal(Moments.of(torch.zeros(0, 2)).var, torch.zeros(2, dtype=torch.float64))


def test_append_adds_shards_and_statistics(tmp_path):
    x, more = rows(500), rows(450, seed=1)
    written(tmp_path / "s", x)
    before = contents(tmp_path / "s")
    store = written(tmp_path / "s", more, append=True)
    assert torch.equal(store.read(slice(None)), torch.cat([x, more]))
    assert torch.equal(store.read(slice(None), "row"), torch.arange(950))
    after = contents(tmp_path / "s")
    assert all(after[name] == before[name] for name in before if name != "manifest.json")
    torch.testing.assert_close(store.mean, torch.cat([x, more]).double().mean(0), rtol=1e-13, atol=1e-16)


def test_shuffle_moves_rows_within_their_shard_and_keeps_their_ids(tmp_path):
    x = rows()
    plain, one, again, two = (written(tmp_path / str(i), x, shuffle=seed) for i, seed in enumerate((None, 1, 1, 2)))
    ids = one.read(slice(None), "row")
    assert torch.equal(one.read(slice(None)), x[ids]) and torch.equal(ids[:300].sort().values, torch.arange(300))
    assert torch.equal(ids, again.read(slice(None), "row"))
    others = (plain.read(slice(None), "row"), two.read(slice(None), "row"))
    assert not any(torch.equal(ids, other) for other in others)
    assert not torch.equal(ids[:100] - 0, ids[300:400] - 300), "each shard has an order of its own"


def test_nothing_written_is_an_empty_store(tmp_path):
    store = written(tmp_path / "s", rows(0))
    assert store.rows == 0 and store.read(slice(None)).shape == (0, D) and store.verify() == []


def test_wrong_reads(tmp_path):
    store = written(tmp_path / "s", rows())
    with pytest.raises(IndexError, match=r"rows must be in \[0, 1000\), got -1 to 3"):
        store.read([3, -1])
    with pytest.raises(IndexError, match="got 1000 to 1000"):
        store.read(torch.tensor([1000]))
    with pytest.raises(TypeError, match="1-d integers, got torch.bool"):
        store.read(torch.ones(1000, dtype=torch.bool))
    with pytest.raises(KeyError, match="no field 'position'; there is x, row"):
        store.read([0], "position")
    with pytest.raises(ValueError, match="needs a store of codes, this one holds activations"):
        store.code([0])


def test_wrong_rows(tmp_path):
    with RowWriter(tmp_path / "s", D) as writer:
        with pytest.raises(ValueError, match=r"x must be torch.float32 \(4, 12\), got torch.float64 \(4, 12\)"):
            writer.add(rows(4).double())
        with pytest.raises(ValueError, match=r"got torch.float32 \(4, 11\)"):
            writer.add(rows(4)[:, 1:])
        with pytest.raises(ValueError, match=r"row must be torch.int64 \(4,\), got torch.int64 \(3,\)"):
            writer.add(rows(4), torch.arange(3))
        with pytest.raises(ValueError, match=r"fields must be \['row', 'x'\], got \['position', 'row', 'x'\]"):
            writer.add(rows(4), torch.arange(4), torch.arange(4, dtype=torch.int32))
    assert writer.store.rows == 0
    with pytest.raises(ValueError, match="shard_rows must be at least 1, got 0"):
        RowWriter(tmp_path / "t", D, shard_rows=0)
    with pytest.raises(ValueError, match="dtype must be one of torch.float32.*, got torch.int8"):
        RowWriter(tmp_path / "t", D, dtype=torch.int8)
    with pytest.raises(ValueError, match="d must be at least 1, got 0"):
        RowWriter(tmp_path / "t", 0)
    assert not (tmp_path / "t").exists()


def test_verify_names_every_kind_of_damage(tmp_path):
    store = written(tmp_path / "s", rows(1500))
    names = [shard.name for shard in store.shards]
    data = bytearray((tmp_path / "s" / names[0]).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "s" / names[0]).write_bytes(data)
    os.truncate(tmp_path / "s" / names[2], 1000)
    os.remove(tmp_path / "s" / names[4])
    found = ActivationStore.open(tmp_path / "s").verify()
    assert [(damage.shard, damage.name) for damage in found] == [(i, names[i]) for i in (0, 2, 4)]
    for damage, problem in zip(found, ("sha256 is", "the file has 1,000 bytes", "the file is missing"), strict=True):
        assert problem in str(damage) and damage.name in str(damage)
    with pytest.raises(ValueError, match=f"{names[2]} is damaged"):
        ActivationStore.open(tmp_path / "s").read([700])


def test_cut_writes_never_look_finished(tmp_path, monkeypatch):
    """An error at each of the renames in turn: no new rows are seen, and the next try gives the whole store."""
    x = rows(700)
    whole = contents_of(written(tmp_path / "whole", x))
    replace, calls = os.replace, []
    for cut in range(1, 8):
        calls.clear()

        def failing(source, target, cut=cut):
            calls.append(target)
            if len(calls) == cut:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(KeyboardInterrupt):
            written(tmp_path / "s", x)
        monkeypatch.setattr(os, "replace", replace)
        assert not list((tmp_path / "s").glob(".*.tmp"))
        with pytest.raises((FileNotFoundError, ValueError), match="no activation store there|is not finished"):
            ActivationStore.open(tmp_path / "s")
        assert contents_of(written(tmp_path / "s", x)) == whole
        shutil.rmtree(tmp_path / "s")
    assert len(calls) == 7, "manifest, three shards with a record each: the last error was at the last record"


def contents_of(store):
    return contents(Path(store.url))


def test_another_store_is_never_touched(tmp_path):
    written(tmp_path / "s", rows(), source={"model": "a", "module": "norm"})
    before = contents(tmp_path / "s")
    cases = [
        (dict(source={"model": "b", "module": "norm"}), D, torch.float32, "model is a there and b here"),
        (dict(source={"model": "a", "module": "out"}), D, torch.float32, "module is norm there and out here"),
        (dict(source={"model": "a"}), D, torch.float32, "module is norm there and absent here"),
        (dict(source={"model": "a", "module": "norm"}), 8, torch.float32, r"field x is float32 \[12\] there"),
        (dict(source={"model": "a", "module": "norm"}), D, torch.float16, r"and float16 \[12\] here"),
    ]
    for options, d, dtype, message in cases:
        for append in (False, True):
            with pytest.raises(ValueError, match=message):
                RowWriter(tmp_path / "s", d, dtype, append=append, **options)
    with pytest.raises(ValueError, match="holds other inputs.*append=True adds these"):
        RowWriter(tmp_path / "s", D, source={"model": "a", "module": "norm"})
    assert contents(tmp_path / "s") == before


def test_other_schema_and_foreign_folders(tmp_path):
    written(tmp_path / "s", rows(10))
    manifest = tmp_path / "s" / "manifest.json"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**facts, "schema": 99}))
    for use in (ActivationStore.open, lambda path: RowWriter(path, D)):
        with pytest.raises(ValueError, match="has schema 99; this version reads and writes 1"):
            use(tmp_path / "s")
    manifest.write_text("{")
    with pytest.raises(ValueError, match="manifest.json is not JSON"):
        ActivationStore.open(tmp_path / "s")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="no activation store; nothing was written"):
        RowWriter(tmp_path / "mine", D)
    assert contents(tmp_path / "mine").keys() == {"thesis.txt"}
    with pytest.raises(FileNotFoundError, match="no activation store there"):
        ActivationStore.open(tmp_path / "none")
    with pytest.raises(ValueError, match="storage_options are for URLs"):
        ActivationStore.open(tmp_path / "none", {"anon": True})


def test_too_little_disk(tmp_path, monkeypatch):
    free = [1 << 40]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free[0]))
    with pytest.raises(OSError, match=r"bytes are free and shard-00000001.safetensors takes [\d,]+; what is finished"):
        with RowWriter(tmp_path / "s", D, shard_rows=100) as writer:
            writer.add(rows(100))
            free[0] = 1 << 10
            writer.add(rows(100))
    assert [p.name for p in sorted((tmp_path / "s").glob("*.safetensors"))] == ["shard-00000000.safetensors"]


def test_shards_in_any_order_by_several_writers(tmp_path):
    parts = [{"x": rows(40, seed=i), "row": torch.arange(40) + 40 * i} for i in range(5)]
    fields = {"x": Field(torch.float32, (D,)), "row": Field(torch.int64)}

    def writer():
        return StoreWriter(tmp_path / "s", "activations", fields, {"model": "m"}, {"inputs": 5})

    one, two = writer(), writer()
    for number in (4, 0, 3):
        one.write(number, [parts[number]])
    assert two.done().keys() == {0, 3, 4}
    with pytest.raises(RuntimeError, match="2 of 5 shards are missing, the first is 1"):
        two.finish(5)
    two.write(2, [parts[2]], dropped=1)
    two.write(1, [{n: t[:7] for n, t in parts[1].items()}, {n: t[7:] for n, t in parts[1].items()}])
    store = one.finish(5)
    assert torch.equal(store.read(slice(None)), torch.cat([part["x"] for part in parts]))
    assert [shard.dropped for shard in store.shards] == [0, 0, 1, 0, 0]
    assert writer().finished
    with pytest.raises(ValueError, match="inputs is 5 there and 6 here"):
        StoreWriter(tmp_path / "s", "activations", fields, {"model": "m"}, {"inputs": 6})


def test_codes(tmp_path):
    from sae_kernels import TopKSAE

    torch.manual_seed(0)
    sae, x = TopKSAE(D, 48, 4, normalize="standardize"), rows(200)
    with torch.no_grad():
        code = sae.encode(x)
    fields = {"values": Field(torch.float32, (4,)), "indices": Field(torch.int32, (4,))}
    fields |= {name: Field(torch.float32, (1,)) for name in ("offset", "scale")} | {"row": Field(torch.int64)}
    writer = StoreWriter(tmp_path / "s", "codes", fields, {"d_sae": 48}, {"inputs": 1})
    tensors = {name: getattr(code, name) for name in ("values", "indices", "offset", "scale")}
    writer.write(0, [{**tensors, "row": torch.arange(200)}])
    store = writer.finish(1)
    assert (store.d, store.mean) == (4, None)
    picked = torch.tensor([150, 3, 3])
    with torch.no_grad():
        assert torch.equal(sae.decode(store.code(picked)), sae.decode(code)[picked])


@pytest.fixture(scope="module")
def bucket():
    """A server that speaks S3, on a free port of this machine."""
    pytest.importorskip("s3fs", reason="needs s3fs: pip install 'sae-kernels[dev]'")
    server = pytest.importorskip("moto.server", reason="needs moto[server]: pip install 'sae-kernels[dev]'")
    from werkzeug.serving import make_server

    serving = make_server("127.0.0.1", 0, server.DomainDispatcherApplication(server.create_backend_app), threaded=True)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{serving.server_port}"
    urllib.request.urlopen(urllib.request.Request(f"{url}/acts", method="PUT"))
    yield {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": url, "region_name": "us-east-1"}}
    serving.shutdown()


def test_a_bucket(bucket, tmp_path):
    x = rows()
    store = written("s3://acts/one", x, storage_options=bucket)
    local = written(tmp_path / "s", x)
    assert [shard.sha256 for shard in store.shards] == [shard.sha256 for shard in local.shards]
    store = ActivationStore.open("s3://acts/one", bucket)
    some = torch.tensor([999, 0, 300, 299, 299, 650])
    assert torch.equal(store.read(slice(None)), x) and torch.equal(store.read(some), x[some])
    assert store.verify() == []
    more = written("s3://acts/one", x, storage_options=bucket, append=True)
    assert more.rows == 2000 and len(more.shards) == 8
    more._files.write(more.shards[5].name, [b"short"])
    assert [damage.shard for damage in more.verify()] == [5]
    assert not [name for name in more._files.names() if name.endswith(".json") and name != "manifest.json"]


def test_a_bucket_that_is_not_there(bucket):
    with pytest.raises(ConnectionError, match="s3://nobody/x: no such bucket: 'nobody'"):
        RowWriter("s3://nobody/x", D, storage_options=bucket)
    away = {**bucket, "client_kwargs": {**bucket["client_kwargs"], "endpoint_url": "http://127.0.0.1:9"}}
    away["config_kwargs"] = {"retries": {"max_attempts": 0}, "connect_timeout": 1}
    with pytest.raises(ConnectionError, match="s3://acts/x cannot be reached"):
        RowWriter("s3://acts/x", D, storage_options=away)
    with pytest.raises(FileNotFoundError, match="no activation store there"):
        ActivationStore.open("s3://acts/none", bucket)
