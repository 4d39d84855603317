"""Times the cells of the plan in a process of its own, which may die without taking the rows with it.

A kernel that reads foreign memory leaves its whole process without a GPU: the process then notes which provider it was
and ends; the next one goes on without that provider in that cell.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sae_kernels.bench import measure, table
from sae_kernels.bench.measure import Row
from sae_kernels.bench.runner import Cells, chosen_providers
from sae_kernels.bench.worker import Team

from .checks import ROOT, environment
from .plan import COMPILED, Cell, plan

LOST_DEVICE = 75  # exit code: the GPU is gone for that process
LEAST_SECONDS = 15.0  # no cell is begun with less than this left
RESTARTS = 8


@dataclass
class State:
    """What one process hands to the next. broken: "cell" -> provider -> status; ceilings: dtype -> Ceilings."""

    device: str
    folder: str
    facts: dict[str, str]
    ops: list[str]
    shut: dict[str, str]
    deadline: float
    headline: bool = False
    ceilings: dict[str, list[float]] = field(default_factory=dict)
    broken: dict[str, dict[str, str]] = field(default_factory=dict)
    current: int | None = None

    def plan(self) -> list[Cell]:
        return plan(self.device, tuple(self.ops), self.headline)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(vars(self)))

    @classmethod
    def load(cls, path: Path) -> "State":
        return cls(**json.loads(path.read_text()))


def measure_all(state: State, path: Path) -> None:
    """Runs processes over the plan until it is done or the time is up. Every row is in state.folder by then."""
    state.save(path)
    for _ in range(RESTARTS):
        left = state.deadline - time.time()
        if left < LEAST_SECONDS:
            return
        try:
            command = [sys.executable, "-m", "benchmarks.gpu.cells", str(path)]
            code = subprocess.run(command, cwd=ROOT, env=_environment(state), timeout=left + LEAST_SECONDS).returncode
        except subprocess.TimeoutExpired:
            print("the last comparison was stopped: the time is up", flush=True)
            return
        if code == 0:
            return
        state = State.load(path)
        if code != LOST_DEVICE:
            if state.current is None:
                print(f"the measuring process ended with code {code} before its first comparison", flush=True)
                return
            cell = state.plan()[state.current]
            table.write([_row(state, cell, f"crashed: the process ended with code {code}")], Path(state.folder))


def _environment(state: State) -> dict[str, str]:
    forced = {"SAE_KERNELS_BACKEND": "triton"} if state.device == "cpu" else {}
    return {**os.environ, **environment(state.device), **forced}


def done(rows: list[Row], commit: str) -> set[tuple]:
    """Cells that need not be measured again: rows of this commit, other than for tests that failed."""
    return {row.cell for row in rows if row.commit == commit and not row.status.startswith("skipped: the tests")}


def _row(state: State, cell: Cell, status: str, provider: str = "sae_kernels") -> Row:
    facts = {name: state.facts[name] for name in ("device", "torch", "triton", "commit")}
    return Row(cell.op, cell.mode, provider, "", *cell.case.size, status=status, **facts)


def _ceilings(state: State, cells: list[Cell]) -> dict[str, measure.Ceilings]:
    if not state.ceilings:
        small = {"size": 128, "mib": 1} if state.device == "cpu" else {}
        found = measure.ceilings({cell.case.dtype for cell in cells}, state.device, **small)
        state.ceilings = {dtype: [limit.copy, limit.product, limit.cache] for dtype, limit in found.items()}
        for dtype, (copy, product, cache) in sorted(state.ceilings.items()):
            rates = f"copy {copy / 1e9:.0f} GB/s, L2 {cache / 1e9:.0f} GB/s, product {product / 1e12:.1f} TFLOP/s"
            print(f"ceiling, {dtype}: {rates}", flush=True)
    return {dtype: measure.Ceilings(*rates) for dtype, rates in state.ceilings.items()}


def _providers(device: str) -> list:
    """Without peers that are not installed and without our reference, which is no contestant; in a rehearsal torch
    alone beside ours.
    """
    if device == "cpu":
        return chosen_providers(["sae_kernels", "torch"], True)
    found = [p for p in chosen_providers(None, True, device) if p.backend != "reference"]
    return [p for p in found if p.package is None or importlib.util.find_spec(p.package) is not None]


def _lost(rows: list[Row], providers: list) -> tuple[str, str] | None:
    """Key and status of the provider that lost the device in this cell."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return None
    except RuntimeError as error:
        text = " ".join(str(error).split())[:120]
    for row in rows:
        if row.status.startswith("crashed"):
            return next(p.key for p in providers if p.name == row.provider), row.status
    return providers[0].key, f"crashed: {text}"


def serve(path: Path) -> int:
    """Measures what is left of the plan; 0, or LOST_DEVICE where a new process has to go on."""
    state = State.load(path)
    folder = Path(state.folder)
    cells = state.plan()
    limits = _ceilings(state, cells)
    everyone = _providers(state.device)
    with Team() as team:
        rounds = 1 if state.device == "cpu" else 5
        run = Cells(everyone, state.device, limits, state.facts, 1.0, rounds, True, True, None, team)
        for number, cell in enumerate(cells):
            left = state.deadline - time.time()
            rows = [row for row in table.read_all(folder) if not cell.compiled or row.provider == COMPILED]
            if cell.key in done(rows, state.facts["commit"]):
                continue
            if cell.op in state.shut:
                if not any(row.cell == cell.key for row in table.read_all(folder)):  # nothing measured is thrown away
                    table.write([_row(state, cell, state.shut[cell.op])], folder)
                continue
            if left < LEAST_SECONDS:
                print(f"the time is up with {len(cells) - number} comparisons to go; another run goes on", flush=True)
                return 0
            state.current = number
            state.save(path)
            broken = state.broken.get(str(number), {})
            run.providers = [p for p in everyone if p.key not in broken and (cell.compiled or p.key != COMPILED)]
            run.budget = 0.0 if state.device == "cpu" else min(4.0, max(0.3, 0.3 * left / (len(cells) - number)))
            rows = run(cell.op, cell.mode, cell.case)
            lost = _lost(rows, run.providers)
            if lost:
                state.broken.setdefault(str(number), {})[lost[0]] = lost[1]
                state.save(path)
                return LOST_DEVICE
            rows += [_row(state, cell, status, key.split(":")[0]) for key, status in broken.items()]
            table.write(rows, folder)
            print(table.cell_text(rows), flush=True)
    return 0


if __name__ == "__main__":
    code = serve(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(code)  # after a lost device the interpreter's own way out can hang
