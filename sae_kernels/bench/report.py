"""README tables and plots from the CSV files; nothing in them is typed by hand."""

import re
from collections.abc import Callable
from pathlib import Path

from . import plots, scaling, table
from .cases import CASES
from .measure import Row

MARKER = re.compile(r"<!-- bench:([a-z]+) -->\n(.*?)<!-- /bench:\1 -->", re.S)
HEADLINE = ("sequential", "collaborative", "embeddings", "serve-1")


class Results:
    """Everything measured on one device: `rows` of the CSV files, `scaling` points."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.relative = (
            folder,
            folder.relative_to(root).as_posix() if folder.is_relative_to(root) else str(folder),
        )
        self.rows, self.scaling = table.read_all(folder), scaling.read(folder / scaling.FILE)

    @property
    def device(self) -> str:
        rows = self.rows or [row for _, _, row in self.scaling]
        return rows[0].device if rows else self.folder.name

    @property
    def on_gpu(self) -> bool:
        return any(row.backend.split("+")[0] in ("cuda", "triton") for row in self.rows)

    def cell(self, op: str, mode: str, case_name: str) -> list[Row]:
        return self.sized(op, mode, CASES[case_name].size)

    def sized(self, op: str, mode: str, size: tuple) -> list[Row]:
        return [
            r for r in self.rows if (r.op, r.mode) == (op, mode) and (r.rows, r.d_in, r.d_sae, r.k, r.dtype) == size
        ]

    def times(self, op: str, mode: str, case_name: str, provider: str) -> str:
        """How many times our time `provider` takes."""
        cell = self.cell(op, mode, case_name)
        mine = table.ours(cell)
        other = next((r for r in cell if r.provider == provider), None)
        if mine is None or other is None:
            return "-"
        return f"{other.p50_ms / mine.p50_ms:.2f}x" if other.p50_ms else other.status.split(":")[0]


def _grid(head: list[str], lines: list[list[str]]) -> str:
    ruler = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ruler, *lines])


def _size(case_name: str) -> str:
    c = CASES[case_name]
    return f"{c.rows}, {c.d_in}, {c.d_sae}, {c.k}"


def headline(found: Results) -> str:
    head = [
        "rows, d_in, d_sae, k",
        "encode, ms",
        "of `F.linear` alone",
        "linear + relu + topk",
        "its backward",
        "training step, ms",
    ]
    head += ["plain torch", "eai-sparsify", "sae-lens", "dictionary-learning"]
    lines = []
    for name in HEADLINE:
        op = "serving" if name.startswith("serve") else "topk_encode"
        mine, step = table.ours(found.cell(op, "forward", name)), table.ours(found.cell("module", "step", name))
        if mine is None:
            continue
        floor = next((r for r in found.cell(op, "forward", name) if r.provider == "linear" and r.p50_ms), None)
        share = f"{mine.p50_ms / floor.p50_ms:.2f}" if floor else "-"
        line = [_size(name), f"{mine.p50_ms:.4g}", share, found.times(op, "forward", name, "torch")]
        line.append(found.times(op, "backward", name, "torch"))
        line.append(f"{step.p50_ms:.4g}" if step else "-")
        where = ("module", "step") if step else (op, "forward")
        peers = ("torch", "eai_sparsify", "sae_lens", "dictionary_learning")
        lines.append(line + ["-" if p == "torch" and not step else found.times(*where, name, p) for p in peers])
    return _grid(head, lines) if lines else ""


def _comparison(op: str, mode: str) -> Callable[[Results], str]:
    def render(found: Results) -> str:
        groups = [c for c in table.cells(found.rows).values() if (c[0].op, c[0].mode) == (op, mode)]
        names = list(dict.fromkeys(r.provider for c in groups for r in c if not r.provider.startswith("sae_kernels")))
        lines = []
        for cell in groups:
            mine = table.ours(cell)
            if mine is None:
                continue
            line = [table.size_text(mine), f"{mine.p50_ms:.4g}"]
            by_name = {r.provider: r for r in cell}
            for name in names:
                row = by_name.get(name)
                factor = "-" if row is None else row.status.split(":")[0]
                line.append(f"{row.p50_ms / mine.p50_ms:.2f}x" if row is not None and row.p50_ms else factor)
            lines.append(line)
        return _grid(["rows x d_in x d_sae, k", "sae_kernels, ms", *names], lines) if lines else ""

    return render


def memory(found: Results) -> str:
    lines = []
    for cell in table.cells(found.rows).values():
        mine = next((r for r in cell if r.provider == "sae_kernels" and r.extra_bytes is not None), None)
        other = next((r for r in cell if r.provider == "torch"), None)
        if mine is None or other is None or (mine.op, mine.mode) != ("module", "step"):
            continue
        theirs = f"{other.extra_bytes / 2**20:.1f}" if other.extra_bytes is not None else other.status.split(":")[0]
        lines.append([table.size_text(mine), f"{mine.extra_bytes / 2**20:.1f}", theirs])
    return (
        _grid(["training step, rows x d_in x d_sae, k", "sae_kernels, MiB", "plain torch, MiB"], lines) if lines else ""
    )


def losses(found: Results) -> str:
    lines = []
    for mine, other in table.losses(found.rows):
        noise = "yes" if other.p80_ms >= mine.p20_ms else "no"
        what = f"{mine.op} {mine.mode}, {table.size_text(mine)}"
        lines.append([what, other.provider, f"{mine.p50_ms / other.p50_ms:.2f}", noise])
    if not lines:
        return "No comparison in which another provider is faster." if found.rows else ""
    return _grid(["comparison", "faster", "our time over theirs", "within the noise"], lines)


def exponents(found: Results) -> str:
    by_key: dict[tuple[str, str, str], dict[str, str]] = {}
    for axis, op, mode, provider, whole, large in scaling.exponents(found.scaling):
        by_key.setdefault((axis, op, mode), {})[provider] = f"{whole:.2f} ({large:.2f})"
    names = ("sae_kernels", "torch", "linear")
    lines = [[f"{op} {mode}, {axis}", *(v.get(n, "-") for n in names)] for (axis, op, mode), v in by_key.items()]
    return _grid(["time ~ size^e: e over all points (over the larger half)", *names], lines) if lines else ""


def machine(found: Results) -> str:
    rows = found.rows or [row for _, _, row in found.scaling]
    commits = ", ".join(dict.fromkeys(row.commit for row in rows))
    versions = ", ".join(dict.fromkeys(f"torch {row.torch}" for row in rows))
    return f"Measured on {found.device}; {versions}; commit {commits}." if rows else ""


def gpu_headline(found: Results) -> str:
    """A line per case whose encode was measured on a GPU: ours, the floor, and how many times our time others take."""
    head = [
        "rows, d_in, d_sae, k",
        "encode, ms",
        "of `F.linear` alone",
        "linear + relu + topk",
        "extra MiB",
        "decode, ms",
    ]
    head += ["embedding_bag", "training step, ms", "plain torch", "eai-sparsify", "statistics, of encode"]
    lines = []
    for cell in table.cells(found.rows).values():
        mine = table.ours(cell)
        if mine is None or (mine.op, mine.mode) != ("topk_encode", "forward"):
            continue
        others = [("sparse_decode", "forward"), ("module", "step"), ("activation_stats", "forward")]
        decode, step, stats = ({r.provider: r for r in reversed(found.sized(*op, mine.cell[2:]))} for op in others)
        encode = {r.provider: r for r in reversed(cell)} | {"sae_kernels": mine}
        name = f"{mine.rows}, {mine.d_in}, {mine.d_sae}, {mine.k}" + (
            f" {mine.dtype}" if mine.dtype != "bfloat16" else ""
        )
        extra = f"{mine.extra_bytes / 2**20:.0f}" if mine.extra_bytes is not None else "-"
        line = [name, _ms(encode), _over(encode, "sae_kernels", "linear", ""), _over(encode, "torch"), extra]
        line += [
            _ms(decode),
            _over(decode, "embedding_bag"),
            _ms(step),
            _over(step, "torch"),
            _over(step, "eai_sparsify"),
        ]
        update = stats.get("sae_kernels")
        same = {"encode": mine, "stats": update if update is not None and update.commit == mine.commit else None}
        share = _over(same, "stats", "encode", "")
        lines.append([*line, share])
    return _grid(head, lines) if lines else ""


def _ms(rows: dict[str, Row]) -> str:
    row = rows.get("sae_kernels")
    return f"{row.p50_ms:.4g}" if row is not None and row.p50_ms else "-"


def _over(rows: dict[str, Row | None], over: str, under: str = "sae_kernels", unit: str = "x") -> str:
    """One time over another, or why there is none."""
    first, second = rows.get(over), rows.get(under)
    if first is None or second is None or not second.p50_ms:
        return "-"
    return f"{first.p50_ms / second.p50_ms:.2f}{unit}" if first.p50_ms else first.status.split(":")[0]


def drawings(found: Results) -> dict[str, str]:
    """File name -> SVG, for whatever has been measured."""
    drawn = {}
    for op, mode, title in (("topk_encode", "forward", "encode"), ("module", "step", "training step")):
        groups = {}
        for name in HEADLINE:
            cell = found.cell(op, mode, name)
            mine = table.ours(cell)
            others = [r for r in cell if r.p50_ms and not r.provider.startswith("sae_kernels")]
            if mine is not None and others:
                groups[_size(name)] = {r.provider: r.p50_ms / mine.p50_ms for r in others}
        if groups:
            title = f"{title}: time over that of sae_kernels (rows, d_in, d_sae, k)"
            drawn[f"ratio_{op}_{mode}.svg"] = plots.bars(title, groups)
    for axis in ("rows", "d_in", "d_sae", "k", "threads"):
        for op, mode in scaling.MEASURED:
            drawn.update(_sweep(found, axis, op, mode))
    return drawn


def _sweep(found: Results, axis: str, op: str, mode: str) -> dict[str, str]:
    times: dict[str, list[tuple[float, float]]] = {}
    room: dict[str, list[tuple[float, float]]] = {}
    for a, value, row in found.scaling:
        if (a, row.op, row.mode) != (axis, op, mode):
            continue
        if row.p50_ms:
            times.setdefault(row.provider, []).append((float(value), row.p50_ms))
        if row.extra_bytes is not None:
            room.setdefault(row.provider, []).append((float(value), max(row.extra_bytes, 2**14) / 2**20))
    drawn = {}
    if any(len(pairs) > 1 for pairs in times.values()):
        drawn[f"time_{op}_{mode}_{axis}.svg"] = plots.lines(f"{op} {mode}", axis, "ms", times)
    if axis in ("rows", "d_sae") and any(len(pairs) > 1 for pairs in room.values()):
        title = f"{op} {mode}: memory beyond inputs and results"
        drawn[f"memory_{op}_{mode}_{axis}.svg"] = plots.lines(title, axis, "MiB", room)
    return drawn


def _pictures(found: Results) -> str:
    shown = [name for name in drawings(found) if name in SHOWN]
    return "\n".join(f"![{name.removesuffix('.svg')}]({found.relative}/{name})" for name in shown)


SHOWN = (
    "ratio_topk_encode_forward.svg",
    "ratio_module_step.svg",
    "time_topk_encode_forward_d_sae.svg",
    "time_topk_encode_forward_k.svg",
    "memory_module_step_rows.svg",
)
BLOCKS: dict[str, Callable[[Results], str]] = {
    "machine": machine,
    "headline": headline,
    "encode": _comparison("topk_encode", "forward"),
    "encodebackward": _comparison("topk_encode", "backward"),
    "decode": _comparison("sparse_decode", "forward"),
    "decodebackward": _comparison("sparse_decode", "backward"),
    "threshold": _comparison("threshold_encode", "forward"),
    "batchtopk": _comparison("batch_topk_encode", "forward"),
    "module": _comparison("module", "forward"),
    "step": _comparison("module", "step"),
    "statistics": _comparison("activation_stats", "forward"),
    "refit": _comparison("refit_values", "forward"),
    "serving": _comparison("serving", "forward"),
    "firstcall": _comparison("first_call", "forward"),
    "importtime": _comparison("import_time", "import"),
    "memory": memory,
    "losses": losses,
    "scaling": exponents,
    "plots": _pictures,
    "gpuheadline": gpu_headline,
}


def devices(results: Path, root: Path) -> list[Results]:
    if not results.is_dir():
        return []
    found = [Results(folder, root) for folder in sorted(results.iterdir()) if folder.is_dir()]
    return [result for result in found if result.rows or result.scaling]


def render(name: str, found: list[Results]) -> str:
    """The text of one block, a heading per device where there are several. gpuNAME: block NAME of GPUs, else CPUs."""
    on_gpu = name.startswith("gpu")
    block = BLOCKS.get(name) or BLOCKS.get(name.removeprefix("gpu"))
    if block is None:
        raise ValueError(f"block {name!r} is unknown; choose from {', '.join(BLOCKS)}")
    texts = [(result.device, block(result)) for result in found if result.on_gpu == on_gpu]
    texts = [(device, text) for device, text in texts if text]
    if not texts:
        return "Not measured yet."
    if len(texts) == 1:
        return texts[0][1]
    return "\n\n".join(f"**{device}**\n\n{text}" for device, text in texts)


def update(text: str, found: list[Results]) -> str:
    """`text` with every block between <!-- bench:NAME --> and <!-- /bench:NAME --> made anew.

    Raises ValueError for an unknown block or one without an end.
    """
    updated = MARKER.sub(lambda m: f"<!-- bench:{m[1]} -->\n{render(m[1], found)}\n<!-- /bench:{m[1]} -->", text)
    opened = re.findall(r"<!-- bench:(\S+) -->", text)
    closed = [m[1] for m in MARKER.finditer(text)]
    if opened != closed:
        raise ValueError(
            f"blocks {', '.join(opened)} are opened and {', '.join(closed)} are closed on a line of their own"
        )
    return updated


def write(root: Path) -> list[Path]:
    """Brings README.md and the plots under `root` up to date with benchmarks/results; returns what changed."""
    found = devices(root / "benchmarks" / "results", root)
    wanted = {result.folder / name: svg for result in found for name, svg in drawings(result).items()}
    readme = root / "README.md"
    if readme.is_file():
        wanted[readme] = update(readme.read_text(), found)
    changed = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    for path in changed:
        path.write_text(wanted[path])
    return changed
