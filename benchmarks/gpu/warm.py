"""Compiles what the plan will launch: a process per case calls our ops on a few of its rows, while the tests run.

Configurations depend on the weights alone, so the measuring process finds every kernel in Triton's cache.
"""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from .checks import ROOT, environment
from .plan import HEADLINE, TUNED, Cell, plan, smaller

ROWS = 64
LARGEST_WEIGHTS = 2**26  # elements: larger ones would fill the device, held by every sweep's process


def cases(device: str, ops: tuple[str, ...], headline: bool) -> list[list[Cell]]:
    """The cells of ours, by case."""
    found: dict[str, list[Cell]] = {}
    for cell in plan(device, ops, headline):
        if not cell.compiled and cell.op not in ("first_call", "serving"):  # of no weights of their own
            found.setdefault(cell.case.name, []).append(cell)
    return list(found.values())


def commands(device: str, ops: tuple[str, ...], headline: bool) -> list[list[str]]:
    """Modules and their arguments: a process per case; where configurations are swept afterwards, one per sweep too."""
    count = len(cases(device, ops, headline))
    calls = [["benchmarks.gpu.warm", device, str(number), str(int(headline)), *ops] for number in range(count)]
    if device == "cpu" or not headline:
        return calls
    swept = [str(number) for number, case in enumerate(HEADLINE) if case.d_in * case.d_sae <= LARGEST_WEIGHTS]
    return calls + [["benchmarks.gpu.tune", device, number, kind] for number in swept for kind in TUNED]


@contextlib.contextmanager
def warming(device: str, ops: tuple[str, ...], headline: bool, log: Path, grace: float = 30.0):
    """Around the tests; what is not compiled when they end has so many seconds more."""
    env = {**os.environ, **environment(device)}
    with log.open("a") as file:
        running = [
            subprocess.Popen([sys.executable, "-m", *call], cwd=ROOT, env=env, stdout=file, stderr=file)
            for call in commands(device, ops, headline)
        ]
        try:
            yield
            deadline = time.time() + grace
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.time()))
        finally:
            for process in running:
                process.kill()
                process.wait()


def main(device: str, number: str, headline: str, *ops: str) -> None:
    from sae_kernels.bench.cell import prepare
    from sae_kernels.bench.providers import PROVIDERS

    for cell in cases(device, ops, headline == "1")[int(number)]:
        start = time.time()
        small = smaller(cell.case, ROWS)
        prepared = prepare(PROVIDERS["sae_kernels"], cell.op, cell.mode, small, device, gate=False)
        if prepared.run is not None:
            prepared.run()
        print(f"compiled {cell.op} {cell.mode}, {cell.case.name}: {prepared.status}, {time.time() - start:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
