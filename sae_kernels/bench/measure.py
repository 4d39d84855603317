"""Timing in interleaved rounds, the machine's ceilings, peak extra memory."""

import contextlib
import ctypes
import gc
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .cases import Case, flops, gathered_bytes, least_bytes, result_bytes

COLUMNS = (
    "op mode provider backend rows d_in d_sae k dtype p20_ms p50_ms p80_ms gb_s gflop_s pct_of_ceiling extra_bytes "
    "status device torch triton commit"
).split()
KEY = ("op", "mode", "rows", "d_in", "d_sae", "k", "dtype")
OK = "ok"
OOM = "OOM"


@dataclass
class Row:
    """One measurement. status: "ok", "OOM", or why there is no figure; then the figures are None."""

    op: str
    mode: str
    provider: str
    backend: str
    rows: int
    d_in: int
    d_sae: int
    k: int
    dtype: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    gb_s: float | None = None
    gflop_s: float | None = None
    pct_of_ceiling: float | None = None
    extra_bytes: int | None = None
    status: str = OK
    device: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""

    @property
    def cell(self) -> tuple:
        """What is compared with one another: op, mode, size, dtype."""
        return tuple(getattr(self, name) for name in KEY)


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a large copy (read and write counted), operations per second of a large product; bytes per
    second read from the L2 cache of a GPU, infinite where that was not measured.
    """

    copy: float
    product: float
    cache: float = math.inf

    def least_seconds(self, op: str, mode: str, case: Case) -> float:
        least = flops(op, mode, case) / self.product, least_bytes(op, mode, case) / self.copy
        return max(*least, gathered_bytes(op, mode, case) / self.cache)


def ceilings(
    dtypes: set[str], device: str = "cpu", size: int | None = None, mib: int | None = None
) -> dict[str, Ceilings]:
    """Per dtype; the product is the fastest of float32's and the dtype's own, as a kernel may upcast.

    size, mib: of the product's square matrices and of the copy's source; None: what fills the device.
    """
    size = size or (8192 if is_cuda(device) else 2048)
    mib = mib or (4096 if is_cuda(device) else 256)
    source = torch.ones(mib * 2**18, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / best_seconds(lambda: target.copy_(source), device)
    rates = {}
    for dtype in sorted({"float32", *dtypes}):
        a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        rates[dtype] = 2 * size**3 / best_seconds(lambda a=a: a @ a, device)
    cache = _cache_rate(device) if is_cuda(device) else math.inf
    return {dtype: Ceilings(copy, max(rates["float32"], rates[dtype]), cache) for dtype in {"float32", *dtypes}}


def _cache_rate(device: str, mib: int = 8, times: int = 256) -> float:
    """Of the faster of two reductions that read the same few MiB again and again, from one end to the other."""
    again = torch.ones(mib * 2**18, device=device).expand(times, -1)
    return times * mib * 2**20 / min(best_seconds(run, device) for run in (lambda: again.sum(1), lambda: again.amax(1)))


def best_seconds(run: Callable[[], Any], device: str, times: int = 5) -> float:
    return min(seconds(run, 1, device) for _ in range(times + 1))


def seconds(run: Callable[[], Any], calls: int, device: str = "cpu") -> float:
    """Mean seconds of one of `calls` calls in a row; on a GPU by its own clock, each call with a cold L2 cache."""
    if is_cuda(device):
        return _event_seconds(run, calls, device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _event_seconds(run: Callable[[], Any], calls: int, device: str) -> float:
    """The overwriting of the cache also keeps the device busy while the host launches the call."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in pairs:
        _cache_filler(device).zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return 1e-3 * sum(start.elapsed_time(end) for start, end in pairs) / calls


@cache
def _cache_filler(device: str) -> torch.Tensor:
    return torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)


def is_cuda(device: str) -> bool:
    return device.startswith("cuda")


def release(device: str) -> None:
    """Gives what the last comparison left behind back to the device."""
    gc.collect()
    if is_cuda(device):
        torch.cuda.empty_cache()


def interleaved(
    timers: dict[Any, Callable[[], Any]], budget: float, least: int = 5, most: int = 40
) -> Iterator[tuple[Any, Any]]:
    """Yields (name, seconds), one of each per round; stops after `budget` seconds or `most` rounds, not before `least`
    rounds. Each round has an order of its own, the same in every run: a call finds caches and threads as the one before
    it left them, and nobody is to follow the same neighbour always."""
    names = list(timers)
    start = time.perf_counter()
    for number in range(most):
        if number >= least and time.perf_counter() - start > budget:
            return
        for name in random.Random(number).sample(names, len(names)):
            yield name, timers[name]()


def percentile(samples: list[float], share: float) -> float:
    """Linear between the two nearest samples."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def fill(row: Row, samples: list[float], case: Case, limit: Ceilings) -> None:
    """Percentiles of `samples` (seconds) and the rates at the median."""
    row.p20_ms, row.p50_ms, row.p80_ms = (1e3 * percentile(samples, share) for share in (0.2, 0.5, 0.8))
    median = percentile(samples, 0.5)
    work, traffic = flops(row.op, row.mode, case), least_bytes(row.op, row.mode, case)
    if work or traffic:
        row.gflop_s, row.gb_s = work / median / 1e9, traffic / median / 1e9
        row.pct_of_ceiling = 100 * limit.least_seconds(row.op, row.mode, case) / median


# memory


def is_oom(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text.lower())
    )


def available_bytes() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable")), None)


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field + ":"))


@contextlib.contextmanager
def memory_guard(device: str = "cpu", share: float = 0.9) -> Iterator[None]:
    """Inside, an allocation beyond `share` of the memory left raises instead of bringing the machine down (Linux).

    Work on a GPU is left alone: its driver maps more than the host has, and the device raises by itself.
    """
    free = None if is_cuda(device) else available_bytes()
    if free is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _status("VmData") + int(share * free)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def peak_extra_bytes(run: Callable[[], Any], op: str, mode: str, case: Case, device: str = "cpu") -> int | None:
    """Peak memory of one call beyond its inputs and the results that the contract names.

    CPU: the resident set's high-water mark, reset before the call, so that native workspaces count too. Meant for a
    process whose allocator gives freed blocks back (MALLOC_MMAP_THRESHOLD_). None where the system has no such counter.
    """
    gc.collect()
    if is_cuda(device):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        return max(0, peak - result_bytes(op, mode, case))
    if not sys.platform.startswith("linux"):
        return None
    with contextlib.suppress(AttributeError):  # a C library without malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM") - before
    del kept
    return max(0, peak - result_bytes(op, mode, case))


# the machine


def device_name(device: str) -> str:
    """CPU: the model, its family and number where those say more than the name, and the threads torch uses."""
    if is_cuda(device):
        return torch.cuda.get_device_name(device)
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            facts[name.strip()] = value.strip()
    name = facts.get("model name", "cpu")
    if not any(c.isdigit() for c in name) and "cpu family" in facts:  # as virtual machines have it
        name += f" family {facts['cpu family']} model {facts['model']}"
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def worker_environment() -> dict[str, str]:
    """Every block of 64 KiB and more is given back when freed, so that peaks do not hide in kept heaps."""
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
