"""`python -m benchmarks.gpu` rehearsed on the CPU: the gate, the rows, going on where a run ended."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import cells, checks, targets, warm  # noqa: E402
from benchmarks.gpu.__main__ import main, options  # noqa: E402
from benchmarks.gpu.plan import HEADLINE, TINY, TUNED, Cell, plan  # noqa: E402
from sae_kernels._info import GPU_VERIFIED  # noqa: E402
from sae_kernels.bench import OPS, Row, table  # noqa: E402
from sae_kernels.bench.providers import COMPILED as CAN_COMPILE  # noqa: E402

ROOT = Path(__file__).parents[1]
GOOD, BAD = "def test_it():\n    pass\n", "def test_it():\n    assert 1 == 2, 'not equal'\n"
FACTS = {"device": "box", "torch": "2", "triton": "3", "commit": "abc"}


def suite(folder: Path, **bodies: str) -> Path:
    for name, body in bodies.items():
        (folder / f"test_{name}.py").write_text(body)
    return folder


def row(op="topk_encode", mode="forward", provider="sae_kernels", case=HEADLINE[0], **changes) -> Row:
    return replace(Row(op, mode, provider, "triton", *case.size, p50_ms=1.0, **FACTS), **changes)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """Decode passes its tests and is timed, encode fails and is not."""
    out = tmp_path_factory.mktemp("out")
    tests = suite(tmp_path_factory.mktemp("tests"), triton_sparse_decode=GOOD, gpu_topk_encode=BAD)
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--no-build", "--commit", "abc"]
    command += ["--out", str(out), "--tests", str(tests), "--op", "encode", "--op", "decode", "--profile"]
    environment = {n: v for n, v in os.environ.items() if n not in ("TRITON_INTERPRET", "SAE_KERNELS_BACKEND")}
    return out, command, subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_correctness_comes_first(rehearsal):
    out, _, done = rehearsal
    assert done.returncode == 1, done.stdout + done.stderr
    rows = {(r.op, r.mode, r.provider): r for path in out.glob("*/*.csv") for r in table.read(path)}
    for mode in OPS["topk_encode"]:
        refused = rows["topk_encode", mode, "sae_kernels"]
        assert refused.p50_ms is None and refused.status.startswith(
            "skipped: the tests of topk_encode: ended with code"
        )
        assert "1 failed" in refused.status and "FAILED" in refused.status
        timed = rows["sparse_decode", mode, "sae_kernels"]
        assert (timed.status, timed.backend, timed.commit) == ("ok", "triton", "abc") and timed.p50_ms > 0
        assert timed.pct_of_ceiling > 0 and rows["sparse_decode", mode, "torch"].p50_ms > 0
    assert "not equal" in (out / "log.txt").read_text()
    assert (
        "not timed, topk_encode: skipped: the tests of topk_encode" in done.stdout and "ceiling, float32" in done.stdout
    )
    assert "sparse_decode forward, 4 x 8 x 40" in (out / "log.txt").read_text()
    assert "compiled sparse_decode backward, tiny: ok" in (out / "log.txt").read_text()
    assert not (out / "state.json").exists()


def test_a_second_run_measures_what_is_missing_alone(rehearsal):
    out, command, _ = rehearsal
    before = {path.name: path.read_text() for path in out.glob("*/sparse_decode.csv")}
    tests = Path(command[command.index("--tests") + 1])
    (tests / "test_triton_sparse_decode.py").write_text(BAD)  # passed for this commit before: not run again
    again = subprocess.run([*command[:-1], "--minutes", "2"], cwd=ROOT, capture_output=True, text=True)
    assert "tests of sparse_decode: ok: 1 passed" in again.stdout and "(before)" in again.stdout
    assert before == {path.name: path.read_text() for path in out.glob("*/sparse_decode.csv")}


def test_the_rows_of_another_folder_count(rehearsal, tmp_path):
    from benchmarks.gpu.__main__ import _bring

    out = rehearsal[0]
    (slug,) = (path.name for path in out.iterdir() if path.is_dir())
    (tmp_path / slug).mkdir()
    _bring(out, tmp_path, slug)
    assert {path.name for path in tmp_path.glob("*/*.csv")} == {"topk_encode.csv", "sparse_decode.csv"}
    kept = cells.done(table.read_all(tmp_path / slug), "abc")
    assert {key[:2] for key in kept} == {("sparse_decode", "forward"), ("sparse_decode", "backward")}
    assert cells.done(table.read_all(tmp_path / slug), "another commit") == set()


def test_gates(tmp_path):
    suite(tmp_path, triton_topk_encode=GOOD, gpu_topk_encode=GOOD, gpu_graphs=GOOD, triton_aot=BAD, other=BAD)
    found = {name: [path.stem for path in files] for name, files in checks.gates(tmp_path).items()}
    assert found == {"topk_encode": ["test_gpu_topk_encode", "test_triton_topk_encode"], "module": ["test_gpu_graphs"]}
    here = {path.stem for files in checks.gates(checks.TESTS).values() for path in files}
    ops = ("topk_encode", "sparse_decode", "activation_stats", "threshold_encode")
    assert here >= {"test_gpu_graphs", *(f"test_triton_{op}" for op in ops)} and "test_triton_aot" not in here
    fine = dict.fromkeys(("topk_encode", "sparse_decode", "sae_loss"), "ok: 3 passed")
    assert checks.shut("serving", fine) is None and checks.shut("module", fine) is None
    assert checks.shut("module", {**fine, "module": "failed"}) == "skipped: the tests of module: failed"
    assert checks.shut("activation_stats", fine) == "skipped: the tests of activation_stats: there are none"


def test_gates_have_their_fixtures():
    """Without conftest.py."""
    files = [str(path) for paths in checks.gates(checks.TESTS).values() for path in paths]
    environment = {**os.environ, **checks.environment("cpu"), **checks.tests_path()}
    done = subprocess.run([*checks.PYTEST, "--setup-plan", *files], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "ERROR" not in done.stdout, done.stdout[-2000:]


def test_tests_that_hang_or_are_all_skipped_open_no_gate(tmp_path):
    slow = suite(tmp_path, triton_topk_encode="import time\ndef test_it():\n    time.sleep(60)\n")
    found = checks.run_tests("cpu", tmp_path, "abc", 4.0, slow)
    assert found["topk_encode"].startswith("did not end within")
    (tmp_path / "test_triton_topk_encode.py").write_text("import pytest\npytest.skip('x', allow_module_level=True)\n")
    found = checks.run_tests("cpu", tmp_path, "abc", 60.0, tmp_path)
    assert not found["topk_encode"].startswith("ok")
    assert json.loads((tmp_path / "tests.json").read_text())["gates"] == found
    assert checks.run_tests("cpu", tmp_path, "abc", 1.0, tmp_path)["topk_encode"] == "not run: no time is left"
    assert checks.run_tests("cpu", tmp_path, "new", 1.0, tmp_path, ("sparse_decode",)) == {}


def test_small_cases_under_the_sanitizer(tmp_path, monkeypatch, capsys):
    """With a stand-in for the tool whose racecheck finds something; other tests and other kernels are let be."""
    assert set(checks.sanitize(tmp_path, time.time() + 60, tmp_path).values()) == {
        "not run: there is no compute-sanitizer on PATH"
    }
    assert "memcheck, racecheck: not run" in capsys.readouterr().out
    tool = tmp_path / "bin" / checks.SANITIZER
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\n[ "$1 $3 $5" = "--tool --error-exitcode --target-processes" ] || exit 1\n'
                    'tool=$2; shift 6; "$@" || exit; [ $tool != racecheck ] || exit 9\n')  # fmt: skip
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    bodies = {"cuda_topk_encode": "def test_ties():\n    pass\ndef test_large():\n    assert False\n"}
    tests = suite(tmp_path, **bodies, triton_topk_encode=BAD, cuda_sparse_decode=BAD.replace("_it", "_ties"))
    found = checks.sanitize(tmp_path, time.time() + 60, tests, ("topk_encode",))
    assert found["memcheck"].startswith("ok: 1 passed, 1 deselected")
    assert found["racecheck"].startswith("ended with code 9; 1 passed")


def test_a_process_that_dies_is_a_row_and_the_next_goes_on(tmp_path, monkeypatch):
    """The first process dies in its first comparison, the second loses the device to a peer, the third finishes."""
    state = cells.State("cpu", str(tmp_path), FACTS, ["sparse_decode"], {}, time.time() + 1000)
    calls = []

    def run(command, **_):
        found = cells.State.load(Path(command[-1]))
        calls.append(found.broken)
        found.current = len(calls) - 1
        if len(calls) == 2:
            found.broken = {"1": {"eai_sparsify": "crashed: illegal address"}}
        found.save(Path(command[-1]))
        return subprocess.CompletedProcess(command, (-11, cells.LOST_DEVICE, 0)[len(calls) - 1])

    monkeypatch.setattr(cells.subprocess, "run", run)
    cells.measure_all(state, tmp_path / "state.json")
    assert len(calls) == 3 and calls[2] == {"1": {"eai_sparsify": "crashed: illegal address"}}
    (dead,) = table.read(tmp_path / "sparse_decode.csv")
    assert (dead.mode, dead.status) == ("forward", "crashed: the process ended with code -11")
    assert ("sparse_decode", "forward", *TINY.size) in cells.done([dead], "abc")


def test_what_compiles_beside_the_tests(tmp_path, monkeypatch):
    """Every case of the plan once and every sweep that follows; what has not ended by the deadline is stopped."""
    calls = warm.commands("cuda", (), True)
    named = [cell[0].case.name for cell in warm.cases("cuda", (), True)]
    assert [call[:4] for call in calls[: len(named)]] == [
        ["benchmarks.gpu.warm", "cuda", str(number), "1"] for number in range(len(named))
    ]
    assert named[:4] == [case.name for case in HEADLINE] and len(calls) == len(named) + 3 * len(TUNED)
    assert calls[-1] == ["benchmarks.gpu.tune", "cuda", "2", TUNED[-1]]  # the weights of the fourth are too large
    assert all(call[0] == "benchmarks.gpu.warm" for call in warm.commands("cuda", (), False))
    monkeypatch.setattr(warm, "commands", lambda *_: [["timeit", "-n", "1", "import time; time.sleep(60)"]])
    start = time.time()
    with warm.warming("cpu", (), False, tmp_path / "log.txt", grace=0.2):
        pass
    assert time.time() - start < 20


def test_no_comparison_begins_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(cells.subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    state = cells.State("cpu", str(tmp_path), FACTS, [], {}, time.time() + 1)
    cells.measure_all(state, tmp_path / "state.json")
    assert cells.State.load(tmp_path / "state.json").current is None and not list(tmp_path.glob("*.csv"))


def test_the_plan_puts_the_issue_s_table_first():
    full = plan("cuda")
    assert [cell.key for cell in full if cell.compiled] == [
        cell.key for cell in full if not cell.compiled and cell.case in HEADLINE and cell[:2] in CAN_COMPILE
    ]
    assert full[-1].compiled and all(not cell.compiled for cell in full[:-16])  # four calls of four cases, last
    first = plan("cuda", headline=True)
    assert full[: len(first)] == first and {cell.op for cell in first} == set(checks.NEEDS)
    assert [cell.case for cell in full[:4]] == list(HEADLINE) and {cell[:2] for cell in full[:4]} == {
        ("topk_encode", "forward")
    }
    sizes = [(c.rows, c.d_in, c.d_sae, c.k) for c in HEADLINE]
    assert sizes == [
        (2**20, 64, 4096, 32),
        (2**20, 256, 16384, 32),
        (2**17, 1536, 24576, 64),
        (2**15, 4096, 131072, 64),
    ]
    assert len({(cell.key, cell.compiled) for cell in full}) == len(full)
    assert all(cell.mode in OPS[cell.op] for cell in full)
    assert {cell.op for cell in plan("cuda", ("serving",))} == {"serving"}
    assert plan("cpu", ("sparse_decode",)) == [Cell("sparse_decode", m, TINY) for m in ("forward", "backward")]


def test_targets_are_judged():
    one = HEADLINE[0]
    rows = [row(p50_ms=2.0, extra_bytes=2**28), row(provider="linear", p50_ms=1.6), row(provider="torch", p50_ms=50.0)]
    rows += [row("activation_stats", p50_ms=0.2), row("sparse_decode", pct_of_ceiling=55.0)]
    rows += [row(provider="linear", p50_ms=None, status="OOM", case=HEADLINE[1]), row(p50_ms=3.0, case=HEADLINE[1])]
    lines = targets.lines(rows)
    size = f"{one.rows} x {one.d_in} x {one.d_sae}, k {one.k}: "
    assert lines == [
        f"{size}encode over F.linear alone 1.25, wanted at most 1: MISSED",
        f"{size}linear + relu + topk over encode 25, wanted at least 20: met",
        f"{size}statistics over encode 0.1, wanted at most 0.05: MISSED",
        f"{size}encode's extra MiB 256, wanted at most 256: met",
        f"{size}decode's % of its bound by memory or L2 55, wanted at least 60: MISSED",
    ]
    assert "none measured yet" in targets.report([])


def fake_subject(monkeypatch, tuner, seconds):
    """A call that takes seconds(fields of its plan) and computes the same whatever they are, unless BLOCK_D is 512."""
    import torch

    def run():
        if tuner.tuning.decode_plan(64, 2).UNROLL == 8:
            raise RuntimeError("out of resource: shared memory")
        return (torch.ones(3) * (9 if tuner.tuning.decode_plan(64, 2).BLOCK_D == 512 else 1),)

    plan = lambda: tuner.tuning.decode_plan(64, 2)  # noqa: E731
    monkeypatch.setattr(tuner, "_seconds", lambda run, device: seconds(plan()))
    monkeypatch.setattr(tuner, "subjects", lambda case, device: [tuner.Subject("decode", "2:64", run, plan)])


def test_tuning_keeps_what_is_faster_and_right(tmp_path, monkeypatch, capsys):
    from benchmarks.gpu import tune as tuner

    monkeypatch.setattr(tuner.measure, "device_name", lambda device: "fast")
    # as it is: 4 rows, 64 columns, 4 unrolled, 4 warps; wrong and failing fields would be fastest
    fake_subject(
        monkeypatch, tuner, lambda p: 1.0 / p.ROWS + 0.01 * p.warps + (0 if p.BLOCK_D == 512 or p.UNROLL == 8 else 1)
    )
    tuner.tune("cpu", tmp_path, time.time() + 100)
    assert json.loads((tmp_path / "tuning.json").read_text()) == {"fast": {"decode": {"2:64": {"ROWS": 8}}}}
    said = capsys.readouterr().out
    assert "BLOCK_D 512: wrong: off by" in said and "UNROLL 8: RuntimeError: out of resource" in said
    tuner.tune("cpu", tmp_path / "never", time.time() - 1)
    assert "the time is up" in capsys.readouterr().out


def test_tuning_finds_up_to_where_codes_are_multiplied_whole(monkeypatch):
    from benchmarks.gpu import tune as tuner

    asked = []

    def seconds(run, device):
        d_sae, k = run.__defaults__[0].case.d_sae, run.__defaults__[0].case.k
        asked.append(d_sae // k)
        dense = tuner.sparse_decode.goes_dense(d_sae, 64, k, tuner.sparse_decode.torch.bfloat16)
        return d_sae / k if dense else 40.0

    monkeypatch.setattr(tuner, "_seconds", seconds)
    assert tuner.dense_below(replace(HEADLINE[0], rows=4), "cpu") == 32 and asked == [8, 8, 16, 16, 32, 32, 64, 64]
    monkeypatch.setattr(tuner, "_seconds", lambda run, device: 1.0)
    assert tuner.dense_below(replace(HEADLINE[0], rows=4), "cpu") == 0


def test_tuning_sweeps_fields_that_the_plans_have(monkeypatch):
    from benchmarks.gpu import tune as tuner

    plans = {
        "fused": tuner.tuning.Tile, "select": tuner.tuning.SelectPlan, "slab": tuner.tuning.SlabPlan,
        "short": tuner.tuning.ShortPlan, "long": tuner.tuning.LongPlan,
        "decode": tuner.tuning.DecodePlan, "sums": tuner.tuning.SumsPlan, "dot": tuner.tuning.DotPlan,
    }  # fmt: skip
    assert {kind: set(f) - set(plans[kind].__dataclass_fields__) for kind, f in tuner.FIELDS.items()} == dict.fromkeys(
        plans, set()
    )
    assert tuple(kind for kind in tuner.FIELDS if kind not in ("short", "long")) == TUNED  # those are of CUDA C++
    small = replace(HEADLINE[0], rows=2)
    subjects = list(tuner.subjects(small, "cpu"))
    assert {s.kind for s in subjects} == set(plans) - {"short", "long"}  # which CUDA C++ has
    monkeypatch.setattr(tuner, "cuda_error", lambda device: None)
    for case, kind in ((small, "short"), (replace(HEADLINE[2], rows=2, d_sae=1024), "long")):
        mine = next(s for s in tuner.subjects(case, "cpu") if s.kind in ("short", "long"))
        assert mine.kind == kind and set(tuner.FIELDS[kind]) == set(vars(mine.plan()))
    assert [s.plan() for s in subjects if s.kind == "decode"] == [tuner.tuning.decode_plan(64, 2)]
    assert "fused" not in {s.kind for s in tuner.subjects(TINY, "cpu")}  # too few latents for that path


def test_info_says_what_the_results_say():
    """An op is verified on the GPUs of which the repository holds a row of ours that passed."""
    verified: dict[str, set[str]] = {}
    for path in (ROOT / "benchmarks" / "results").glob("*/*.csv"):
        for r in table.read(path) if path.stem in OPS else ():
            if r.provider == "sae_kernels" and r.backend.split("+")[0] in ("triton", "cuda") and r.status == "ok":
                verified.setdefault(r.op, set()).add(r.device)
    for op, gpu in GPU_VERIFIED.items():
        # the loss is timed as part of a module's step
        found = verified.get({"ActivationStats": "activation_stats", "sae_loss": "module"}.get(op, op), set())
        assert gpu in found if found else gpu is None, f"{op}: info() says {gpu}, the rows {sorted(found)}"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--out"),
        (["--out", "x", "--op", "gelu"], "--op 'gelu' is unknown; choose from topk_encode"),
        (["--out", "x", "--minutes", "0", "--device", "cpu"], "--minutes must be more than 0, got 0"),
        (["--out", "x", "--device", "cpu", "--resume", "/no/such"], "there is no such folder"),
    ],
)
def test_wrong_options(arguments, says, capsys):
    with pytest.raises(SystemExit):
        options(arguments)
    assert says in capsys.readouterr().err


@pytest.mark.skipif(__import__("torch").cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        main(["--out", "x"])
    assert "finds no CUDA device" in capsys.readouterr().err
