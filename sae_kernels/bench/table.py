"""Rows as CSV and as text: losses first."""

import csv
from collections.abc import Iterable
from pathlib import Path

from .cases import CASES, OPS
from .measure import COLUMNS, Row

FLOORS = ("linear",)
PLAIN = ("torch", "torch_compile", "embedding_bag")
_INTS = ("rows", "d_in", "d_sae", "k", "extra_bytes")
_FLOATS = ("p20_ms", "p50_ms", "p80_ms", "gb_s", "gflop_s", "pct_of_ceiling")


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[Row]:
    """The rows of one CSV. Raises ValueError where the columns are others."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(COLUMNS):
            raise ValueError(f"{path}: columns are {reader.fieldnames}, expected {list(COLUMNS)}")
        return [Row(**{name: _value(name, text) for name, text in line.items()}) for line in reader]


def _value(name: str, text: str):
    if name in _INTS:
        return int(text) if text else None
    if name in _FLOATS:
        return float(text) if text else None
    return text


def read_all(folder: Path) -> list[Row]:
    return [row for op in OPS if (folder / f"{op}.csv").is_file() for row in read(folder / f"{op}.csv")]


def write(rows: Iterable[Row], folder: Path) -> None:
    """Adds rows to folder/<op>.csv. A comparison measured again replaces the old one whole."""
    by_op: dict[str, list[Row]] = {}
    for row in rows:
        by_op.setdefault(row.op, []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    for op, new in by_op.items():
        path = folder / f"{op}.csv"
        fresh = {row.cell for row in new}
        old = [row for row in read(path) if row.cell not in fresh] if path.is_file() else []
        order = {mode: number for number, mode in enumerate(OPS[op])}
        merged = sorted([*old, *new], key=lambda row: (order.get(row.mode, 9), row.dtype != "float32"))
        partial = path.with_suffix(".csv.part")
        with partial.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows([_text(getattr(row, name)) for name in COLUMNS] for row in merged)
        partial.replace(path)  # an interrupt leaves the old file or the new one, never half of one


def cells(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    grouped: dict[tuple, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.cell, []).append(row)
    return grouped


def ours(rows: Iterable[Row]) -> Row | None:
    """Our row as a user gets it: no forced backend, this commit."""
    found = [row for row in rows if row.provider == "sae_kernels" and row.p50_ms]
    return found[0] if found else None


def size_text(row: Row) -> str:
    dtype = "" if row.dtype == "float32" else f" {row.dtype}"
    sizes = " x ".join(str(size) for size in (row.rows, row.d_in, row.d_sae) if size)  # statistics know no d_in
    return f"{sizes}, k {row.k}{dtype}"


def losses(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """(ours, theirs) for every other provider that is faster; plain torch first, then the largest factor.

    Floors, which do only part of the work, and our own forced backends are not in it.
    """
    found = []
    for cell in cells(rows).values():
        mine = ours(cell)
        if mine is None:
            continue
        others = (r for r in cell if r.p50_ms and r.provider not in FLOORS and not r.provider.startswith("sae_kernels"))
        found += [(mine, other) for other in others if other.p50_ms < mine.p50_ms]
    return sorted(found, key=lambda pair: (pair[1].provider not in PLAIN, -pair[0].p50_ms / pair[1].p50_ms))


def losses_text(rows: list[Row]) -> str:
    lines = []
    for mine, other in losses(rows):
        noise = ", within the noise" if other.p80_ms >= mine.p20_ms else ""
        factor = mine.p50_ms / other.p50_ms
        what = f"{mine.op} {mine.mode} at {size_text(mine)}"
        lines.append(f"  {what}: {factor:.2f} times the time of {other.provider}{noise}")
    return "\n".join(["losses:", *lines]) if lines else "losses: none, ours is the fastest wherever it was compared"


def cell_text(rows: list[Row]) -> str:
    """One comparison as a small table."""
    if not rows:
        return ""
    mine = ours(rows)
    lines = [f"{rows[0].op} {rows[0].mode}, {size_text(rows[0])}"]
    for row in rows:
        name = f"  {row.provider} ({row.backend})" if row.provider.startswith("sae_kernels") else f"  {row.provider}"
        if row.p50_ms is None:
            lines.append(f"{name:<32} {row.status}")
            continue
        ratio = "" if mine is None or mine is row else f"  {row.p50_ms / mine.p50_ms:6.2f}x"
        memory = "" if row.extra_bytes is None else f"  {row.extra_bytes / 2**20:8.1f} MiB extra"
        rate = "" if row.pct_of_ceiling is None else f"  {row.gflop_s:7.1f} GFLOP/s {row.pct_of_ceiling:4.0f} %"
        spread = f"({row.p20_ms:.4g} to {row.p80_ms:.4g})"
        lines.append(f"{name:<32} {row.p50_ms:9.4g} ms {spread:<20}{ratio:>9}{rate}{memory}".rstrip())
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """Losses first, then our time and the factors of the others, one line per comparison."""
    lines = [losses_text(rows), ""]
    for cell in cells(rows).values():
        mine = ours(cell)
        if mine is None:
            continue
        others = [r for r in cell if r is not mine and r.p50_ms]
        factors = ", ".join(f"{_name(r)} {r.p50_ms / mine.p50_ms:.2f}x" for r in others)
        missing = [f"{_name(r)}: {r.status}" for r in cell if not r.p50_ms]
        text = f"{mine.op} {mine.mode}, {size_text(mine)}: {mine.p50_ms:.4g} ms"
        lines.append("; ".join([text, *([factors] if factors else []), *missing]))
    return "\n".join(lines)


def _name(row: Row) -> str:
    return f"{row.provider}:{row.backend}" if row.provider == "sae_kernels" else row.provider


def registry() -> str:
    """Every case and provider by name."""
    from .providers import PROVIDERS

    lines = ["cases (rows x d_in x d_sae, k, dtype; * in the quick table):"]
    for c in CASES.values():
        size = f"{c.rows} x {c.d_in} x {c.d_sae}, {c.k}, {c.dtype}"
        lines.append(f"  {c.name:<22}{'*' if c.quick else ' '} {size:<40} {', '.join(c.ops)}")
    lines += ["ops:", *(f"  {op}: {', '.join(modes)}" for op, modes in OPS.items()), "providers:"]
    lines += [f"  {key}{' *' if p.quick else ''}" for key, p in PROVIDERS.items()]
    return "\n".join(lines)
