"""Proves and measures the kernels on a GPU: builds, runs every GPU test, then times what passed.

    python -m benchmarks.gpu --out DIR --tune               what a first look takes: build, tests, the headline cases,
                                                            then a sweep of the Triton configurations
    python -m benchmarks.gpu --out DIR --resume EARLIER     what EARLIER lacks: the other cases, torch.compile
    python -m benchmarks.gpu --out DIR --resume EARLIER --sanitize
                                                            and then small cases under memcheck and racecheck
    python -m benchmarks.gpu --out DIR --resume EARLIER --profile
                                                            and then the time per kernel of the headline cases

Everything ends within --minutes. What is worth most comes first: tests of all ops (or of what --op needs) at once, each
in a process of its own, while the kernels of the cases compile beside them; the headline case of every op; the rest.
Whatever is cut off is done by another run with --resume, which runs no test and no comparison of the same commit again.

Rows go to DIR/<device>/<op>.csv as they are measured, what the build, the tests and the profile say to DIR/log.txt,
tested gates to DIR/tests.json, what the sweep found to DIR/tuning.json: that file goes to sae_kernels/kernels/, and
rows under the next commit are measured with it. What becomes part of the repository are the rows, in
benchmarks/results/<device>/.

Needs Python 3.10, torch 2.10 with CUDA, Triton 3.6, numpy, pytest and hypothesis; for the CUDA C++ kernels nvcc of
torch's CUDA release and setuptools 77 (one GPU generation compiles in about two minutes of one core); pytest-xdist to
use more than one core per op. What is missing can be brought as wheels on PYTHONPATH. No network, no git (then give
--commit), no install: it runs from the root of the sources, and nothing built elsewhere is needed. Peers that are not
installed have no rows; eai-sparsify and sae-lens can be brought as wheels too. `--device cpu` rehearses all this in
Triton's interpreter.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from sae_kernels.bench import table
from sae_kernels.bench.cases import ALIASES
from sae_kernels.bench.runner import machine_facts

from . import cells, checks, targets
from .plan import plan
from .warm import warming

TESTS_SHARE = 0.7  # of the time, at most, for building and testing
SANITIZE_SHARE = 0.4  # of it, kept back from timing


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for rows, log and tables")
    parser.add_argument("--op", action="append", default=[], help="one op alone; may be given several times")
    parser.add_argument("--resume", type=Path, metavar="EARLIER", help="rows of this folder count as well as DIR's own")
    parser.add_argument("--minutes", type=float, default=8.0, help="all of it ends by then")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu: a rehearsal with one tiny case")
    parser.add_argument("--commit", help="what the rows are to say where there is no git checkout")
    parser.add_argument("--tests", type=Path, default=checks.TESTS, help="folder of the tests that come first")
    parser.add_argument("--no-build", action="store_true", help="the native libraries are built already")
    parser.add_argument("--tune", action="store_true", help="time the headline cases alone, then sweep configurations")
    parser.add_argument(
        "--profile", action="store_true", help="then the time per kernel of the headline cases, also where tests failed"
    )
    parser.add_argument(
        "--sanitize",
        action="store_true",
        help="then, with the minutes that are left, small cases under compute-sanitizer: memcheck and racecheck",
    )
    chosen = parser.parse_args(arguments)
    chosen.op = [ALIASES.get(op, op) for op in chosen.op]
    for op in chosen.op:
        if op not in checks.NEEDS:
            parser.error(f"--op {op!r} is unknown; choose from {', '.join(checks.NEEDS)}")
    if chosen.minutes <= 0:
        parser.error(f"--minutes must be more than 0, got {chosen.minutes:g}")
    if chosen.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {chosen.device!r} is not here: torch {torch.__version__} finds no CUDA device")
    if chosen.resume is not None and not chosen.resume.is_dir():
        parser.error(f"--resume {chosen.resume}: there is no such folder")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = options(arguments)
    start = time.time()
    deadline = start + 60 * chosen.minutes
    facts = machine_facts(chosen.device)
    facts["commit"] = chosen.commit or facts["commit"]
    out = chosen.out.resolve()
    folder = out / facts["slug"]
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{facts['device']}; torch {facts['torch']}, triton {facts['triton'] or '-'}; {facts['commit']}", flush=True)
    if chosen.resume is not None:
        _bring(chosen.resume, out, facts["slug"])
    log = out / "log.txt"
    if not chosen.no_build:
        print(f"native library: {checks.build(log, chosen.device)} ({time.time() - start:.0f} s)", flush=True)
    tested_by = start + TESTS_SHARE * 60 * chosen.minutes
    with warming(chosen.device, tuple(chosen.op), chosen.tune, log):
        gates = checks.run_tests(
            chosen.device, out, facts["commit"], tested_by - time.time(), chosen.tests, tuple(chosen.op)
        )
    print(f"tested and compiled after {time.time() - start:.0f} s", flush=True)
    shut = {op: why for op in chosen.op or checks.NEEDS if (why := checks.shut(op, gates))}
    for why in dict.fromkeys(shut.values()):
        print(f"not timed, {', '.join(op for op in shut if shut[op] == why)}: {why}", flush=True)
    kept_back = (60 if chosen.profile else 0) + (SANITIZE_SHARE * 60 * chosen.minutes if chosen.sanitize else 0)
    state = cells.State(chosen.device, str(folder), facts, chosen.op, shut, deadline - kept_back, chosen.tune)
    cells.measure_all(state, out / "state.json")
    (out / "state.json").unlink(missing_ok=True)
    print(f"\n{targets.report(table.read_all(folder))}", flush=True)
    os.environ.update(checks.environment(chosen.device))  # before the kernels are imported
    if chosen.profile:
        from .profile import profiled

        text = profiled(plan(chosen.device, tuple(chosen.op), headline=True), chosen.device)
        with log.open("a") as file:
            file.write(text + "\n")
        print(f"\n{text}", flush=True)
    if chosen.tune:
        from .tune import tune

        tune(chosen.device, out, deadline)
    tools = checks.sanitize(out, deadline, chosen.tests, tuple(chosen.op)) if chosen.sanitize else {}
    print(f"{time.time() - start:.0f} s; rows in {folder}/", flush=True)
    return 1 if shut or not all(status.startswith("ok") for status in tools.values()) else 0


def _bring(earlier: Path, out: Path, slug: str) -> None:
    """Rows and test results of another folder, where this one has none."""
    for source in [*(earlier / slug).glob("*.csv"), earlier / "tests.json"]:
        target = out / source.relative_to(earlier)
        if source.is_file() and not target.exists():
            shutil.copyfile(source, target)


if __name__ == "__main__":
    sys.exit(main())
