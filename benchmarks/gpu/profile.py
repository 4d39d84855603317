"""Time per kernel of our ops, from torch.profiler."""

import torch
from torch.profiler import ProfilerActivity, profile

from sae_kernels.bench.cell import prepare
from sae_kernels.bench.measure import is_cuda, release
from sae_kernels.bench.providers import PROVIDERS

from .plan import Cell

CALLS, SHOWN = 3, 12


def profiled(cells: list[Cell], device: str) -> str:
    """A table per cell of the kernels' own ops: kernels by their share of the time, calls, microseconds per call."""
    return "\n\n".join(_table(cell, device) for cell in cells if cell.op not in ("first_call", "serving"))


def _table(cell: Cell, device: str) -> str:
    op, mode, case, _ = cell
    head = f"{op} {mode}, {case.rows} x {case.d_in} x {case.d_sae}, k {case.k}, {case.dtype}"
    prepared = prepare(PROVIDERS["sae_kernels"], op, mode, case, device, gate=False)
    if prepared.run is None:
        return f"{head}: {prepared.status}"
    cuda = is_cuda(device)
    prepared.run()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        for _ in range(CALLS):
            prepared.run()
        if cuda:
            torch.cuda.synchronize()
    spent = "self_device_time_total" if cuda else "self_cpu_time_total"
    times = {event.key: (getattr(event, spent), event.count) for event in found.key_averages()}
    release(device)
    total = sum(time for time, _ in times.values())
    ranked = sorted(times.items(), key=lambda item: -item[1][0])[:SHOWN]
    rows = [
        f"{time / max(total, 1e-9):7.1%} {time / CALLS:12.1f} us {count / CALLS:8.1f} calls  {name[:100]}"
        for name, (time, count) in ranked
    ]
    return "\n".join([f"{head} ({prepared.backend}): {total / CALLS:.1f} us in all", *rows])
