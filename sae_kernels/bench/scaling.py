"""Cost as work grows: one size swept at a time, exponents fitted to the times."""

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from . import measure
from .cases import INPUTS, Case
from .cell import prepare
from .measure import COLUMNS, Row
from .providers import PROVIDERS
from .table import _text, _value
from .worker import Worker, WorkerDied

START = Case("scaling", 2048, 256, 8192, 32)
AXES = {
    "rows": (64, 256, 1024, 4096, 16384, 65536),
    "d_in": (64, 128, 256, 512, 1024, 2048),
    "d_sae": (2048, 4096, 8192, 16384, 32768, 65536, 131072),
    "k": (8, 16, 32, 64, 128, 256, 512),
    "input": INPUTS,
}
MEASURED = (("topk_encode", "forward"), ("module", "step"))
NAMES = ("sae_kernels", "torch", "linear")
FILE = "scaling.csv"


def points(axis: str) -> Iterable[tuple[str, Case, int]]:
    """(value, case, threads) along one axis."""
    threads = torch.get_num_threads()
    if axis == "threads":
        for n in sorted({1, 2, 4, 8, 16, 32, 64, threads}):
            if n <= threads:
                yield str(n), START, n
        return
    for value in AXES[axis]:
        yield str(value), replace(START, **{"inputs" if axis == "input" else axis: value}), threads


def measure_all(
    out: Path | str, device: str = "cpu", axes: Iterable[str] = (*AXES, "threads"), say: Callable[[str], None] = print
) -> list[tuple[str, str, Row]]:
    """Measures every axis, writes out/<device>/scaling.csv and prints the exponents; Ctrl-C keeps what was measured."""
    from .runner import machine_facts

    facts = machine_facts(device)
    folder = Path(out) / facts["slug"]
    limit = measure.ceilings(set(), device)["float32"]
    found: list[tuple[str, str, Row]] = []
    try:
        for axis in axes:
            for op, mode in MEASURED:
                if axis == "input" and mode == "step":
                    continue
                for value, case, threads in points(axis):
                    rows = _measure(op, mode, case, threads, device, limit, facts)
                    found += [(axis, value, row) for row in rows]
                    times = ", ".join(
                        f"{r.provider} {r.p50_ms:.4g} ms" if r.p50_ms else f"{r.provider} {r.status}" for r in rows
                    )
                    say(f"{op} {mode}, {axis} {value}: {times}")
                    _write(found, folder)
    except KeyboardInterrupt:
        say(f"interrupted: {len(found)} rows kept")
    say(exponents_text(found))
    say(f"CSV in {folder / FILE}")
    return found


def _measure(op, mode, case, threads, device, limit, facts) -> list[Row]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows, timers, samples = [], {}, {}
        for name in NAMES:
            if name == "linear" and op != "topk_encode":
                continue
            provider = PROVIDERS[name]
            about = {key: facts[key] for key in ("device", "torch", "triton", "commit")}
            rows.append(row := Row(op, mode, name, provider.backend, *case.size, **about))
            row.extra_bytes, row.status = (
                (None, measure.OK) if name == "linear" else _memory(op, mode, case, name, threads)
            )
            if row.status != measure.OK:
                continue
            # inputs that are all equal leave no selection to compare; every other point is checked
            prepared = prepare(provider, op, mode, case, device, gate=case.inputs not in ("equal", "negative"))
            row.status, row.backend = prepared.status, prepared.backend
            if prepared.run is not None:
                once = measure.seconds(prepared.run, 1, device)
                calls = max(1, min(1000, int(5e-3 / once)))
                timers[len(rows) - 1] = lambda run=prepared.run, n=calls: measure.seconds(run, n, device)
                samples[len(rows) - 1] = []
        for number, seconds in measure.interleaved(timers, 2.0, 5):
            samples[number].append(seconds)
        for number, taken in samples.items():
            measure.fill(rows[number], taken, case, limit)
        return rows
    finally:
        torch.set_num_threads(before)


def _memory(op: str, mode: str, case: Case, name: str, threads: int) -> tuple[int | None, str]:
    from dataclasses import asdict

    try:
        with Worker(threads=threads) as worker:
            reply = worker.ask(do="memory", op=op, mode=mode, case=asdict(case), provider=name)
    except WorkerDied as error:
        return None, str(error)
    return reply["bytes"], reply["status"]


def _write(found: list[tuple[str, str, Row]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (FILE + ".part")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("axis", "value", *COLUMNS))
        writer.writerows((axis, value, *(_text(getattr(row, name)) for name in COLUMNS)) for axis, value, row in found)
    partial.replace(folder / FILE)


def read(path: Path) -> list[tuple[str, str, Row]]:
    """(axis, value, row) of a scaling.csv; empty where there is none."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [
        (line["axis"], line["value"], Row(**{name: _value(name, line[name]) for name in COLUMNS})) for line in lines
    ]


def slope(x: list[float], y: list[float]) -> float:
    """Least-squares exponent of y ~ x^slope."""
    if len(x) < 2 or len(x) != len(y):
        raise ValueError(f"slope needs two points and more, x and y alike; got {len(x)} and {len(y)}")
    a, b = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    square = sum((p - mean_a) ** 2 for p in a)
    if square == 0:
        raise ValueError("slope needs two different x")
    return sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True)) / square


def exponents(found: Iterable[tuple[str, str, Row]]) -> list[tuple[str, str, str, str, float, float]]:
    """(axis, op, mode, provider, exponent over all points, exponent over the larger half) for every swept number."""
    series: dict[tuple[str, str, str, str], list[tuple[float, float]]] = {}
    for axis, value, row in found:
        if axis != "input" and row.p50_ms:
            series.setdefault((axis, row.op, row.mode, row.provider), []).append((float(value), row.p50_ms))
    fitted = []
    for key, pairs in series.items():
        if len(pairs) < 2:
            continue
        large = pairs[-max(2, len(pairs) // 2) :]
        fitted.append((*key, slope(*map(list, zip(*pairs, strict=True))), slope(*map(list, zip(*large, strict=True)))))
    return fitted


def exponents_text(found: list[tuple[str, str, Row]]) -> str:
    lines = ["time ~ size^e, fitted over all points (over the larger half):"]
    for axis, op, mode, provider, whole, large in exponents(found):
        lines.append(f"  {op} {mode}, {axis:<8} {provider:<12} e = {whole:.2f} ({large:.2f})")
    return "\n".join(lines)
