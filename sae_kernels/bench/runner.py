"""Runs the suite: picks cases and providers, measures them in interleaved rounds, writes CSV after every cell."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from . import measure, table
from .base import base_checkout
from .cases import ALIASES, CASES, OPS, Case, flops, least_bytes
from .cell import Prepared, prepare, reason
from .measure import Row
from .providers import PROVIDERS, Provider, ours_backend
from .worker import Team, Worker, WorkerDied
from .workload import Workload

FULL_OUT, QUICK_OUT = Path("benchmarks/results"), Path("runs/bench")
COLD_OPS = ("first_call", "import_time")
NOT_QUICK = ("module", "forward")  # its two halves are in the quick table
SETTLE = 0.01  # seconds after which idle OpenMP threads of one process no longer spin beside those of another
LONGEST_CALL = 5.0  # seconds; a longer one is a row that says so
MEMORY_IN_QUICK = ("sae_kernels", "torch")


def run(
    ops: Iterable[str] | None = None,
    cases: Iterable[str | Case] | None = None,
    providers: Iterable[str] | None = None,
    *,
    full: bool = False,
    device: str = "cpu",
    out: Path | str | None = None,
    base: str | None = None,
    seconds_per_cell: float | None = None,
    memory: bool = True,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Measures and returns the rows; with `out`, writes them to out/<device>/<op>.csv after every cell.

    ops, cases, providers: names of the registries, or Case objects (default: the quick table's, with `full` all).
    base: a git revision whose ops are measured beside these. Raises ValueError for an unknown name, listing the known.
    A KeyboardInterrupt ends the run early and quietly: the rows measured so far are returned.
    """
    plan = list(_plan(ops, cases, full))
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(
            f"device {device!r} is not here; choose from cpu{', cuda' if torch.cuda.is_available() else ''}"
        )
    chosen = chosen_providers(providers, full, device)
    budget = seconds_per_cell or (4.0 if full else 2.0)
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        checkout = None
        if base is not None:
            say(f"building {base} in a throw-away worktree ...")
            checkout = stack.enter_context(base_checkout(base))
        facts = machine_facts(device)
        say("measuring the ceilings: a large copy, a large product ...")
        limits = measure.ceilings({case.dtype for _, _, case in plan}, device)
        for dtype, limit in sorted(limits.items()):
            say(f"  {dtype}: copy {limit.copy / 1e9:.1f} GB/s, product {limit.product / 1e9:.0f} GFLOP/s")
        team = stack.enter_context(Team())
        run_cell = Cells(chosen, device, limits, facts, budget, 5 if full else 3, memory, full, checkout, team)
        try:
            for op, mode, case in plan:
                found = run_cell(op, mode, case)
                rows += found
                if out is not None:
                    table.write(found, Path(out) / facts["slug"])
                say(table.cell_text(found))
        except KeyboardInterrupt:
            say(f"interrupted: {len(rows)} rows kept")
    return rows


def machine_facts(device: str) -> dict[str, str]:
    """What stands in every row: device, versions, commit; and the folder of the device's results."""
    name = measure.device_name(device)
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton,
        "commit": commit(),
        "slug": measure.slug(name),
    }


def commit() -> str:
    """The checkout's commit, with "+" where sources have changed since; the version of an installed package."""
    folder = Path(__file__).parents[2]
    try:
        git = ["git", "-C", str(folder)]
        hash_ = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        paths = [p for p in ("csrc", "sae_kernels", "setup.py") if (folder / p).exists()]
        tracked = subprocess.run([*git, "ls-files", "sae_kernels"], capture_output=True, text=True, check=True).stdout
        if not tracked:
            raise FileNotFoundError
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", *paths], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        import sae_kernels

        return f"v{sae_kernels.__version__}"
    return hash_.stdout.strip() + ("+" if changed.stdout else "")


def _known(kind: str, name: str, known: Iterable[str]) -> str:
    if name not in known:
        raise ValueError(f"{kind} {name!r} is unknown; choose from {', '.join(known)}")
    return name


def _plan(ops, cases, full) -> Iterable[tuple[str, str, Case]]:
    names = [_known("op", ALIASES.get(op, op), OPS) for op in ops] if ops else list(OPS)
    if cases:
        picked = [case if isinstance(case, Case) else CASES[_known("case", case, CASES)] for case in cases]
    else:
        picked = [case for case in CASES.values() if full or case.quick]
    triples = [(op, mode, case) for op in names for mode in OPS[op] for case in picked if op in case.ops]
    if not (ops or cases or full):
        triples = [triple for triple in triples if triple[:2] != NOT_QUICK]
    if not triples:
        raise ValueError(
            f"none of the cases {', '.join(c.name for c in picked)} has op {', '.join(names)}; their ops: "
            + ", ".join(dict.fromkeys(op for c in picked for op in c.ops))
        )
    return triples


def chosen_providers(names: Iterable[str] | None, full: bool, device: str = "cpu") -> list[Provider]:
    """The named ones, or all that are for the device (the quick table's unless full)."""
    if names:
        return [PROVIDERS[_known("provider", name, PROVIDERS)] for name in names]
    here = (p for p in PROVIDERS.values() if p.only_on is None or device.startswith(p.only_on))
    return [p for p in here if full or p.quick]


_Timer = Callable[[int], float]  # number of calls -> seconds of one


class _Failed(Exception):
    """A call in another process failed; the text is its status."""


def _asking(ask: Callable[..., dict]) -> _Timer:
    """Times in another process."""

    def timed(calls: int) -> float:
        time.sleep(SETTLE)
        reply = ask(do="time", calls=calls)
        time.sleep(SETTLE)
        if reply["status"] != measure.OK:
            raise _Failed(reply["status"])
        return reply["seconds"]

    return timed


def _once(rows: list[Row], timed: dict[int, _Timer], calls: dict[int, int], number: int) -> float | None:
    """Seconds of a call; None, and the reason in the row, where it fails: the others go on."""
    if rows[number].status != measure.OK:
        return None
    try:
        return timed[number](calls.get(number, 1))
    except Exception as error:
        rows[number].status = str(error) if isinstance(error, (_Failed, WorkerDied)) else reason(error)
        return None


class Cells:
    """Measures one (op, mode, case) with every provider."""

    def __init__(self, providers, device, limits, facts, budget, rounds, memory, full, checkout, team) -> None:
        self.providers, self.device, self.limits, self.facts = providers, device, limits, facts
        self.budget, self.rounds, self.memory, self.full = budget, rounds, memory, full
        self.checkout, self.team = checkout, team

    def __call__(self, op: str, mode: str, case: Case) -> list[Row]:
        if op in COLD_OPS:
            return self._cold(op, mode, case)
        found = self._compare(op, mode, case)
        self.team.rest()
        measure.release(self.device)
        return found

    def _compare(self, op: str, mode: str, case: Case) -> list[Row]:
        impossible = self._impossible(op, mode, case)
        workload = Workload(case, self.device)
        rows: list[Row] = []
        with contextlib.ExitStack() as stack:
            timed: dict[int, _Timer] = {}
            for provider in self._compared(op, mode, case):
                row = self._row(op, mode, case, provider)
                rows.append(row)
                if impossible:
                    row.status = impossible
                elif self._measure_memory(row, provider, op, mode, case):
                    call = self._prepare(row, provider, op, mode, case, workload)
                    if call is not None:
                        timed[len(rows) - 1] = call
            if self.checkout is not None and not impossible:
                rows.append(self._row(op, mode, case, PROVIDERS["sae_kernels"]))
                remote = self._base(stack, rows[-1], op, mode, case)
                if remote is not None:
                    timed[len(rows) - 1] = remote
            self._time(rows, timed, case)
        return [row for row in rows if self._tells(row)]

    def _impossible(self, op: str, mode: str, case: Case) -> str | None:
        """Why no provider is asked: inputs and results do not fit, or one call takes too long."""
        free = measure.available_bytes()
        if self.device == "cpu" and free is not None and least_bytes(op, mode, case) > free:
            return measure.OOM
        # a backward pass has a forward pass before it
        work = max(flops(op, mode, case), flops(op, "forward", case)) / self.limits[case.dtype].product
        return f"skipped: the product alone takes {work:.0f} s here" if work > LONGEST_CALL else None

    def _tells(self, row: Row) -> bool:
        """Floors and decoders alone have no row for an op that is not theirs; a peer always has one."""
        alone = ("skipped: a floor", "skipped: a decoder alone", "skipped: not an op of torch", "skipped: not compiled")
        return not row.status.startswith(alone)

    def _row(self, op: str, mode: str, case: Case, provider: Provider) -> Row:
        backend = ours_backend(self.device, op, mode, case) if provider.backend == "auto" else provider.backend
        facts = {name: self.facts[name] for name in ("device", "torch", "triton", "commit")}
        return Row(op, mode, provider.name, backend, *case.size, **facts)

    def _compared(self, op: str, mode: str, case: Case) -> list[Provider]:
        """Our forced backends are measured where the quick table is, and where they were asked for, but for the one
        that is taken anyway."""
        if not self.full or case.quick:
            same = f"sae_kernels:{ours_backend(self.device, op, mode, case)}" if self.full else ""
            return [p for p in self.providers if p.key != same]
        return [p for p in self.providers if p.name != "sae_kernels" or p.backend == "auto"]

    def _prepare(self, row: Row, provider: Provider, op: str, mode: str, case: Case, w: Workload) -> _Timer | None:
        """Ours and torch in this process; each peer in its own, as some change torch for everybody when imported."""
        if provider.package is not None and self.device == "cpu":
            reply = self.team.ask(provider.key, do="build", op=op, mode=mode, case=asdict(case), provider=provider.key)
            row.status, row.backend = reply["status"], reply.get("backend", row.backend)
            return _asking(partial(self.team.ask, provider.key)) if row.status == measure.OK else None
        prepared = prepare(provider, op, mode, case, self.device, w=w)
        row.status, row.backend = prepared.status, prepared.backend
        if prepared.run is None or (self.device != "cpu" and not self._peak_on_device(row, prepared, case)):
            return None
        return self._local(prepared)

    def _peak_on_device(self, row: Row, prepared: Prepared, case: Case) -> bool:
        """Peak extra bytes of a second call: the first one compiles kernels and sets libraries up."""
        if not self.memory:
            return True
        try:
            prepared.run()
            row.extra_bytes = measure.peak_extra_bytes(prepared.run, row.op, row.mode, case, self.device)
        except Exception as error:
            row.status = reason(error)
        return row.status == measure.OK

    def _local(self, prepared: Prepared) -> _Timer:
        def timed(calls: int) -> float:
            with measure.memory_guard(self.device):
                return measure.seconds(prepared.run, calls, self.device)

        return timed

    def _base(self, stack, row: Row, op: str, mode: str, case: Case) -> _Timer | None:
        row.provider, row.commit = "sae_kernels_base", self.checkout.commit
        worker = stack.enter_context(Worker(self.checkout.folder, torch.get_num_threads()))
        try:
            reply = worker.ask(do="build", op=op, mode=mode, case=asdict(case), provider="sae_kernels")
        except WorkerDied as error:
            row.status = str(error)
            return None
        row.status, row.backend = reply["status"], reply["backend"]
        return _asking(worker.ask) if row.status == measure.OK else None

    def _measure_memory(self, row: Row, provider: Provider, op: str, mode: str, case: Case) -> bool:
        """In another process; False where the call cannot be made in this machine's memory. Not for GPUs, which count
        what they hand out."""
        wanted = self.memory and self.device == "cpu" and op != "activation_stats" and provider.backend != "inductor"
        if not wanted or not (self.full or (op == "module" and mode == "step" and provider.key in MEMORY_IN_QUICK)):
            return True
        name = provider.key if provider.package is not None else "memory"
        reply = self.team.ask(name, do="memory", op=op, mode=mode, case=asdict(case), provider=provider.key)
        self.team.ask(name, do="free")
        row.extra_bytes, row.status = reply.get("bytes"), reply["status"]
        return reply["status"] == measure.OK

    def _time(self, rows: list[Row], timed: dict[int, _Timer], case: Case) -> None:
        samples: dict[int, list[float]] = {}
        calls: dict[int, int] = {}
        once = partial(_once, rows, timed, calls)
        round_seconds = 0.0
        for number in timed:
            warm = once(number)
            # the first call of a fast one is mostly first touch, that of a GPU kernel mostly its compilation
            if warm is not None and (warm < 0.1 or self.device != "cpu"):
                warm = once(number)
            if warm is not None:
                round_seconds += warm
                calls[number], samples[number] = max(1, min(1000, int(2e-3 / max(warm, 1e-9)))), []
        timers = {number: partial(once, number) for number in samples}
        rounds = self.rounds if round_seconds < 10 else 3
        for number, seconds in measure.interleaved(timers, self.budget, rounds):
            if seconds is not None:
                samples[number].append(seconds)
        for number, found in samples.items():
            if rows[number].status == measure.OK:
                measure.fill(rows[number], found, case, self.limits[case.dtype])

    def _cold(self, op: str, mode: str, case: Case) -> list[Row]:
        """Import and first call, each time in a fresh process; torch itself is imported before the clock starts."""
        rows = []
        for provider in self.providers:
            package = provider.package or {"sae_kernels": "sae_kernels"}.get(provider.name)
            if provider.backend != "auto" and (package is None or provider.package is None):
                if op == "import_time" or provider.name not in ("torch", "torch_compile"):
                    continue
            rows.append(row := self._row(op, mode, case, provider))
            samples = []
            for _ in range(self.rounds if self.full and self.device == "cpu" else 2):
                try:
                    with Worker(threads=torch.get_num_threads()) as worker:
                        reply = worker.ask(
                            do="cold", package=package or "torch", op="topk_encode", mode="forward",
                            case=asdict(case), provider=provider.key, device=self.device,
                        )  # fmt: skip
                except WorkerDied as error:
                    reply = {"status": str(error)}
                got = reply.get("import" if op == "import_time" else "first")
                if got is None:
                    row.status = reply["status"]
                    break
                samples.append(got)
            if samples and row.status == measure.OK:
                measure.fill(row, samples, case, self.limits[case.dtype])
        return rows


def main(options) -> int:
    """What `sae-kernels bench` does with its parsed options."""
    from . import scaling

    if options.list:
        print(table.registry())
        return 0
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    out = options.out or (FULL_OUT if options.full else QUICK_OUT)
    start = time.perf_counter()
    if options.scaling:
        given = [f"--{name}" for name in ("op", "case", "provider", "base") if getattr(options, name)]
        if given:
            raise ValueError(f"--scaling has operations and sizes of its own and takes no {' or '.join(given)}")
        scaling.measure_all(out, device=options.device)
        return 0
    rows = run(
        options.op, options.case, options.provider,
        full=options.full, device=options.device, out=out, base=options.base, say=lambda text: print(text, flush=True),
    )  # fmt: skip
    print()
    print(table.summary(rows))
    folder = out / machine_facts(options.device)["slug"]
    print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s; CSV in {folder}/")
    if not options.full and not options.provider and sys.stdout.isatty():
        print("this was the quick table; --full adds every case, torch.compile, the peers and memory")
    return 0
