"""The benchmark suite: its gate, its figures, its files."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sae_kernels as sk
from sae_kernels.bench import CASES, OPS, PROVIDERS, Case, Row, measure, oracle, run, table
from sae_kernels.bench.call import Call, Unsupported
from sae_kernels.bench.cases import flops, least_bytes, result_bytes
from sae_kernels.bench.cell import prepare
from sae_kernels.bench.measure import Ceilings
from sae_kernels.bench.providers import Built, Provider
from sae_kernels.bench.worker import Team, Worker, WorkerDied
from sae_kernels.bench.workload import Workload
from sae_kernels.cli import main

ROOT = Path(__file__).parents[1]
EVERY = ("topk_encode", "sparse_decode", "module", "activation_stats", "threshold_encode", "batch_topk_encode")
TINY = Case("tiny", 96, 24, 160, 5, ops=(*EVERY, "refit_values", "serving"))
CELLS = [(op, mode) for op in TINY.ops for mode in OPS[op]]
LIMIT = Ceilings(copy=1e10, product=1e11)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    full = measure.ceilings
    monkeypatch.setattr(measure, "ceilings", lambda dtypes, device="cpu": full(dtypes, device, size=256, mib=4))


def row(provider="sae_kernels", p50=1.0, **changes):
    base = Row(
        "topk_encode", "forward", provider, "cpu", 96, 24, 160, 5, "float32", 0.9 * p50, p50, 1.1 * p50, device="box"
    )
    return replace(base, **changes)


# the gate


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(("op", "mode"), CELLS)
@pytest.mark.parametrize("key", ["sae_kernels", "sae_kernels:reference", "torch"])
def test_right_results_pass_the_gate(key, op, mode, dtype):
    assert prepare(PROVIDERS[key], op, mode, replace(TINY, dtype=dtype)).status == "ok"


@pytest.mark.parametrize(
    ("op", "mode", "key"), [("topk_encode", "forward", "linear"), ("sparse_decode", "backward", "embedding_bag")]
)
def test_floor_and_bag_pass_the_gate(op, mode, key):
    assert prepare(PROVIDERS[key], op, mode, TINY).status == "ok"


def broken(op, mode, change):
    """Plain torch with its result changed before it is checked."""

    def build(op_, mode_, w):
        call = PROVIDERS["torch"].build(op_, mode_, w).call
        return Built(Call(call.run, lambda r: change(tuple(t.clone() for t in call.read(r)))))

    return prepare(Provider("broken", build), op, mode, TINY).status


def _scaled(position, factor):
    def change(result):
        changed = list(result)
        changed[position] = (changed[position] * factor).to(changed[position].dtype)
        return tuple(changed)

    return change


def _twice(result):
    values, indices = result
    values[:, 1], indices[:, 1] = values[:, 0], indices[:, 0]
    return values, indices


def _other_latents(result):
    return result[0], (result[1] + 1) % TINY.d_sae


def _one_less(result):
    counts = result[0]
    counts[counts.argmax()] -= 1
    return result


@pytest.mark.parametrize(
    ("op", "mode", "change", "says"),
    [
        ("topk_encode", "forward", _scaled(0, 1.01), "values"),
        ("topk_encode", "forward", _scaled(0, float("nan")), "values"),
        ("topk_encode", "forward", _twice, "twice"),
        ("topk_encode", "forward", _other_latents, "chosen"),
        ("topk_encode", "forward", lambda r: (r[0][:, :-1], r[1][:, :-1]), "shape"),
        ("topk_encode", "forward", lambda r: (torch.ones(TINY.rows, TINY.d_sae),), "more than k"),
        ("topk_encode", "backward", _scaled(0, 1.01), "dW_enc"),
        ("topk_encode", "backward", _scaled(1, 1.01), "db_enc"),
        ("sparse_decode", "forward", _scaled(0, 1.01), "y is off"),
        ("sparse_decode", "backward", _scaled(0, 1.01), "dvalues"),
        ("sparse_decode", "backward", _scaled(1, 1.01), "dW_dec"),
        ("module", "forward", _scaled(0, 1.01), "x_hat"),
        ("module", "step", _scaled(0, 1.01), "gradients"),
        ("activation_stats", "forward", _one_less, "counts"),
        ("activation_stats", "forward", _scaled(1, 1.01), "sum"),
        ("activation_stats", "forward", _scaled(2, 1.01), "max"),
    ],
)
def test_wrong_results_become_a_row_that_says_so(op, mode, change, says):
    status = broken(op, mode, change)
    assert status.startswith("wrong: ") and says in status


def test_step_gate_ignores_the_loss_factor():
    assert broken("module", "step", lambda grads: tuple(7 * g for g in grads)) == "ok"


def test_whatever_a_provider_raises_is_a_row():
    def says(error):
        def build(op, mode, w):
            raise error

        return prepare(Provider("p", build), "topk_encode", "forward", TINY).status

    assert says(Unsupported("no GPU")) == "skipped: no GPU"
    assert says(ZeroDivisionError("by\nzero")) == "crashed: ZeroDivisionError: by zero"
    assert says(MemoryError()) == "OOM"
    assert says(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")) == "OOM"
    gone = prepare(Provider("p", None, package="no_such_library"), "topk_encode", "forward", TINY)
    assert gone.run is None and "no_such_library is not importable" in gone.status


def test_sample_rows_have_a_clear_last_place():
    small = Workload(TINY).sample(8)
    best = (small.x.double() @ small.W_enc.double().mT + small.b_enc.double()).relu().topk(TINY.k + 1).values
    everything = (
        (Workload(TINY).x.double() @ small.W_enc.double().mT + small.b_enc.double()).relu().topk(TINY.k + 1).values
    )
    assert small.case.rows == 8
    assert (best[:, -2] - best[:, -1]).min() > (everything[:, -2] - everything[:, -1]).median()


@pytest.mark.parametrize("inputs", ["sorted", "equal", "negative", "clustered"])
def test_inputs_are_what_they_are_called(inputs):
    w = Workload(replace(TINY, inputs=inputs))
    pre = w.x @ w.W_enc.mT
    if inputs == "sorted":
        assert (pre.diff(dim=1) > 0).all()
    elif inputs == "equal":
        assert torch.allclose(pre, pre[:, :1].expand_as(pre), rtol=1e-5)
    elif inputs == "negative":
        assert (pre < 0).all()
    else:
        near = torch.nn.functional.cosine_similarity(w.W_enc[0], w.W_enc[1], dim=0)
        far = torch.nn.functional.cosine_similarity(w.W_enc[0], w.W_enc[100], dim=0)
        assert near > far + 0.2


# figures


def test_percentiles_rates_and_ceiling():
    case = Case("c", 1000, 100, 2000, 10)
    filled = row()
    measure.fill(filled, [0.01 * n for n in range(1, 12)], case, LIMIT)
    assert (filled.p20_ms, filled.p50_ms, filled.p80_ms) == pytest.approx((30.0, 60.0, 90.0))
    assert filled.gflop_s == pytest.approx(2 * 1000 * 100 * 2000 / 0.06 / 1e9)
    traffic = 4 * (1000 * 100 + 2000 * 100) + 8 * 1000 * 10
    assert filled.gb_s == pytest.approx(traffic / 0.06 / 1e9)
    assert filled.pct_of_ceiling == pytest.approx(100 * (4e8 / 1e11) / 0.06)


@pytest.mark.parametrize(("op", "mode"), CELLS)
def test_every_op_has_work_and_traffic(op, mode):
    assert flops(op, mode, TINY) > 0 and least_bytes(op, mode, TINY) >= result_bytes(op, mode, TINY) >= 0
    assert (op, mode) in oracle._CHECKS or op == "serving"


def test_rounds_are_interleaved_and_nobody_keeps_a_neighbour():
    timers = {name: lambda: 1.0 for name in "abcd"}
    rounds = 24
    order = [name for name, _ in measure.interleaved(timers, budget=0.0, least=rounds)]
    assert order == [name for name, _ in measure.interleaved(timers, budget=0.0, least=rounds)]
    turns = [order[i : i + 4] for i in range(0, 4 * rounds, 4)]
    assert all(sorted(turn) == list("abcd") for turn in turns) and len(order) == 4 * rounds
    followers = {(a, b) for a, b in itertools.pairwise(order) if a != b}
    assert len(followers) == 12
    assert len(list(measure.interleaved({"a": lambda: 1.0}, budget=1e9, least=1, most=7))) == 7


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is read from /proc")
def test_peak_memory_counts_what_is_allocated_and_freed():
    def run_(mib):
        return f"(lambda: torch.ones({mib} * 2**18).sum())"

    code = (
        "import torch; from sae_kernels.bench import measure; from sae_kernels.bench.cases import Case\n"
        "case = Case('c', 1, 1, 1, 1)\n"
        f"runs = ({run_(1)}, {run_(64)}, {run_(8)})\n"
        "print([measure.peak_extra_bytes(run, 'none', 'none', case) / 2**20 for run in runs])"
    )
    env = {**measure.worker_environment(), "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    _, large, small = json.loads(out.splitlines()[-1])
    assert large == pytest.approx(64, abs=4) and small == pytest.approx(8, abs=4)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_an_allocation_beyond_memory_is_oom_and_nothing_breaks():
    limit = measure.available_bytes()
    with measure.memory_guard(), pytest.raises(RuntimeError) as caught:
        torch.empty(limit // 4 + 2**28).fill_(1)
    assert measure.is_oom(caught.value)
    assert torch.empty(2**20).fill_(1).sum() == 2**20


# the worker


def test_worker_builds_times_and_dies_as_a_row():
    from dataclasses import asdict

    with Worker(threads=1) as worker:
        request = {"op": "topk_encode", "mode": "forward", "case": asdict(TINY), "provider": "sae_kernels"}
        assert worker.ask(do="build", **request)["status"] == "ok"
        assert 0 < worker.ask(do="time", calls=2)["seconds"] < 30
        memory = worker.ask(do="memory", **request)
        assert memory["status"] == "ok" and 0 <= memory["bytes"] < 2**26
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="OOM"):
            worker.ask(do="time", calls=1)


def test_cold_call_reports_import_and_first_call():
    from dataclasses import asdict

    request = {"op": "topk_encode", "mode": "forward", "case": asdict(TINY), "provider": "sae_kernels"}
    with Worker(threads=1) as worker:
        reply = worker.ask(do="cold", package="sae_kernels", **request)
        assert reply["status"] == "ok" and reply["import"] > 0 and reply["first"] > 0
        assert "not importable" in worker.ask(do="cold", package="no_such_library", **request)["status"]


# runs


def test_run_writes_rows_with_every_column(tmp_path):
    said = []
    rows = run(["encode"], [TINY], ["sae_kernels", "torch"], out=tmp_path, seconds_per_cell=0.01, say=said.append)
    assert [(r.op, r.mode, r.provider) for r in rows] == [
        ("topk_encode", mode, name) for mode in ("forward", "backward") for name in ("sae_kernels", "torch")
    ]
    (path,) = tmp_path.glob("*/topk_encode.csv")
    assert path.read_text().splitlines()[0] == (
        "op,mode,provider,backend,rows,d_in,d_sae,k,dtype,p20_ms,p50_ms,p80_ms,gb_s,gflop_s,pct_of_ceiling,extra_bytes,"
        "status,device,torch,triton,commit"
    )
    kept = table.read(path)
    assert [r.provider for r in kept] == [r.provider for r in rows]
    for got, made in zip(kept, rows, strict=True):
        assert got.p50_ms == pytest.approx(made.p50_ms, rel=1e-3) and made.p20_ms <= made.p50_ms <= made.p80_ms
        assert made.status == "ok" and made.torch == torch.__version__ and made.commit and made.gflop_s > 0
    assert any("topk_encode forward, 96 x 24 x 160, k 5" in text for text in said)


def test_a_peer_that_cannot_be_imported_is_a_row(tmp_path, monkeypatch):
    (tmp_path / "sae_lens.py").write_text("raise ImportError('needs a newer torch')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = run(["module"], [TINY], ["sae_kernels", "sae_lens"], seconds_per_cell=0.01, memory=False, say=lambda _: None)
    assert [r.p50_ms is None for r in rows if r.provider == "sae_lens"] == [True, True]
    assert all("not importable: needs a newer torch" in r.status for r in rows if r.provider == "sae_lens")


def test_a_peer_that_crashes_its_process_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch):
    (tmp_path / "sae_lens.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = run(["module"], [TINY], ["sae_lens", "sae_kernels"], seconds_per_cell=0.01, memory=False, say=lambda _: None)
    assert all("ended with code 3" in r.status and r.p50_ms is None for r in rows if r.provider == "sae_lens")
    assert [r.status for r in rows if r.provider == "sae_kernels"] == ["ok", "ok"]


def test_a_call_that_fails_in_a_later_round_is_a_row(monkeypatch):
    def build(op, mode, w):
        times = iter(range(4))
        call = PROVIDERS["torch"].build(op, mode, w).call
        return Built(Call(lambda: (next(times), call.run())[1], call.read))

    monkeypatch.setitem(PROVIDERS, "tired", Provider("tired", build))
    slow = Case("slow", 4096, 64, 2048, 8)
    rows = run(["encode"], [slow], ["tired", "sae_kernels"], seconds_per_cell=0.01, say=lambda _: None)
    assert [(r.provider, r.status.split(":")[0], r.p50_ms is None) for r in rows if r.mode == "forward"] == [
        ("tired", "crashed", True), ("sae_kernels", "ok", False),
    ]  # fmt: skip


def test_a_team_starts_a_dead_worker_again():
    with Team() as team:
        assert team.ask("a", do="free")["status"] == "ok"
        os.kill(team._workers["a"]._process.pid, signal.SIGKILL)
        assert team.ask("a", do="free")["status"] == "OOM"
        assert team.ask("a", do="free")["status"] == "ok"


def test_ctrl_c_keeps_the_rows(tmp_path, monkeypatch):
    from sae_kernels.bench import runner

    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return prepare(*args, **kwargs)

    monkeypatch.setattr(runner, "prepare", interrupted)
    rows = run(["topk_encode"], [TINY], ["sae_kernels"], out=tmp_path, seconds_per_cell=0.01, say=lambda _: None)
    assert [r.mode for r in rows] == ["forward"]
    assert [r.mode for r in table.read(next(tmp_path.glob("*/topk_encode.csv")))] == ["forward"]


def test_a_case_too_large_for_this_machine_is_a_row():
    slow = Case("slow", 2**20, 1024, 2**20, 32, ops=("topk_encode",))
    huge = Case("huge", 2**40, 4096, 64, 32, ops=("sparse_decode",))
    rows = run(["encode", "decode"], [slow, huge], ["sae_kernels", "torch"], say=lambda _: None)
    said = {(r.op, r.mode, r.provider): r.status for r in rows}
    assert len(said) == 8 and all(r.p50_ms is None for r in rows)
    assert all("the product alone takes" in text for (op, _, _), text in said.items() if op == "topk_encode")
    assert all(text == "OOM" for (op, _, _), text in said.items() if op == "sparse_decode")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ops": ["encoder"]}, "op 'encoder' is unknown; choose from topk_encode"),
        ({"cases": ["large"]}, "case 'large' is unknown; choose from sequential"),
        ({"providers": ["jax"]}, "provider 'jax' is unknown; choose from sae_kernels"),
        (
            {"ops": ["encode"], "cases": ["stream"]},
            "none of the cases stream has op topk_encode; their ops: activation_stats",
        ),
        ({"device": "tpu"}, "device 'tpu' is not here; choose from cpu"),
    ],
)
def test_unknown_names_list_the_known(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(**arguments)


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(CASES, "tiny", TINY)
    assert main(["bench", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*CASES, *OPS, *PROVIDERS))
    assert main(["bench", "--case", "nope"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "choose from" in error and "collaborative" in error
    assert main(["bench", "--scaling", "--op", "decode", "--base", "HEAD"]) == 2
    assert "takes no --op or --base" in capsys.readouterr().err
    assert main(["bench", "--scaling", "--device", "tpu"]) == 2 and "choose from cpu" in capsys.readouterr().err
    assert main(["bench", "--op", "decode", "--case", "tiny", "--provider", "sae_kernels", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "losses" in out and len(list(tmp_path.glob("*/sparse_decode.csv"))) == 1


def test_base_revision_unknown_is_one_line():
    with pytest.raises(ValueError, match="no such commit"):
        run(["encode"], [TINY], ["sae_kernels"], base="no-such-revision", say=lambda _: None)


# our backends


def test_forced_backends_run_what_they_say():
    w = Workload(TINY)
    ours = PROVIDERS["sae_kernels"].build("topk_encode", "forward", w).call.run()
    forced = PROVIDERS["sae_kernels:reference"].build("topk_encode", "forward", w).call.run()
    assert torch.equal(ours[1], forced[1]) and sk.info()["backend_forced"] is (
        os.environ.get("SAE_KERNELS_BACKEND", "auto") != "auto"
    )
