"""Sweeps the fields of every plan in kernels/tuning.py, one at a time, and keeps what is faster and right.

`python -m benchmarks.gpu.tune DEVICE CASE KIND` only compiles one sweep's candidates, each beside the plan as it is.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_kernels.bench import measure
from sae_kernels.bench.cases import Case
from sae_kernels.bench.workload import Workload
from sae_kernels.cuda import topk_encode as cuda_topk_encode
from sae_kernels.kernels import sparse_decode, topk_encode, tuning
from sae_kernels.kernels.latent_sums import latent_sums
from sae_kernels.ops._backend import cuda_error

from .plan import HEADLINE, TINY, smaller

FIELDS: dict[str, dict[str, tuple]] = {
    "fused": {
        "BLOCK_M": (64, 128, 256), "BLOCK_N": (128, 256), "warps": (4, 8), "BLOCK_D": (32, 64, 128),
        "stages": (2, 3, 4), "LEVELS": (2, 3, 4), "TILES": (4, 8, 16, 32), "GROWTH": (2, 4),
    },
    "select": {"ROWS": (1, 2, 4, 8), "warps": (1, 2, 4, 8), "rescan_warps": (1, 2, 4, 8)},
    "slab": {"nbytes": tuple(mib * 2**20 for mib in (8, 16, 24, 32, 48))},
    "short": {"share": (1, 2, 4, 8, 16, 32)},
    "long": {"panels": (True, False), "nbytes": tuple(mib * 2**20 for mib in (16, 24, 48, 64, 96))},
    "decode": {"ROWS": (1, 2, 4, 8), "BLOCK_D": (32, 64, 128, 256, 512), "UNROLL": (2, 4, 8), "warps": (1, 2, 4, 8)},
    "sums": {"ENTRIES": (4, 8, 16, 32), "BLOCK_D": (32, 64, 128, 256), "warps": (1, 2, 4, 8)},
    "dot": {"BLOCK_K": (4, 8, 16), "BLOCK_D": (64, 128, 256), "warps": (1, 2, 4, 8)},
}  # fmt: skip
DENSE = (8, 16, 32, 64, 128, 256, 512)  # latents per entry of a row
ROWS, WARM_ROWS = 131072, 64
WORTH = 0.97  # of the best time so far; less is noise
ROUNDS = 7
TOLERANCE = 0.02  # of the largest entry: other tiles sum in another order
LARGEST_FUSED_TRIED = 1536


@dataclass(frozen=True)
class Subject:
    """A call whose time one kind of plan decides, and that plan as it is now."""

    kind: str
    where: str
    run: Callable[[], tuple[Tensor, ...]]
    plan: Callable[[], Any]


def subjects(case: Case, device: str) -> Iterator[Subject]:
    w, k, d = Workload(case, device), case.k, case.d_in
    size = w.dtype.itemsize
    near = tuning.bucket(d, size)

    def encode(path: str) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: topk_encode.topk_encode(w.x, w.W_enc, w.b_enc, k, 0, None, path)[:1]

    if d <= LARGEST_FUSED_TRIED and tuning.first_step(case.d_sae, k) > 1:
        yield Subject("fused", near, encode("fused"), lambda: tuning.fused_tile(d, size))
    yield Subject("select", str(tuning.select_plan(k).P), encode("slab"), lambda: tuning.select_plan(k))
    yield Subject("slab", str(size), encode("slab"), lambda: tuning.slab_plan(size))
    if cuda_error(w.x.device) is None:
        of_cuda = lambda: cuda_topk_encode.topk_encode(w.x, w.W_enc, w.b_enc, k, 0, None)[:1]  # noqa: E731
        if cuda_topk_encode.layout_of(w.x, w.W_enc, k):
            yield Subject("short", near, of_cuda, lambda: tuning.short_plan(d, size))
        else:
            yield Subject("long", near, of_cuda, lambda: tuning.long_plan(d, size))
    values, indices, W = w.values, w.indices, w.W_dec
    decode = lambda: (sparse_decode.sparse_decode(values, indices, W, None),)  # noqa: E731
    yield Subject("decode", near, decode, lambda: tuning.decode_plan(d, size))
    sums = lambda: latent_sums(indices, values, w.grad_out, case.d_sae, with_totals=True)[:2]  # noqa: E731
    yield Subject("sums", near, sums, lambda: tuning.sums_plan(d, size))
    dots = lambda: (sparse_decode.grad_values(w.grad_out, indices, W),)  # noqa: E731
    yield Subject("dot", near, dots, lambda: tuning.dot_plan(k, d, size))


def _cases(device: str, rows: int) -> list[Case]:
    return [TINY] if device == "cpu" else [smaller(case, rows) for case in HEADLINE]


def compile_candidates(device: str, number: str, kind: str) -> None:
    """Fills Triton's cache; what does not build is told by the sweep."""
    for subject in subjects(_cases(device, WARM_ROWS)[int(number)], device):
        for field, candidates in FIELDS[kind].items() if subject.kind == kind else ():
            for candidate in candidates:
                with tuning.trying(kind, **{field: candidate}), contextlib.suppress(Exception):
                    subject.run()


def tune(device: str, out: Path, deadline: float) -> None:
    """Writes out/tuning.json after every subject: the table that ships, with this device's part brought up to date."""
    name = measure.device_name(device)
    table = json.loads(json.dumps(tuning.table()))
    mine = table.setdefault(name, {})
    path_times: dict[str, dict[int, bool]] = {}
    swept: set[tuple[str, str]] = set()
    for case in _cases(device, ROWS):
        seen: dict[str, float] = {}
        for subject in subjects(case, device):
            if time.time() > deadline:
                print("the time is up; what was found stands in the table", flush=True)
                return
            new = (subject.kind, subject.where) not in swept
            best, seconds = _sweep(subject, device, deadline, FIELDS[subject.kind] if new else {})
            swept.add((subject.kind, subject.where))
            seen[subject.kind] = seconds
            if subject.kind == "decode" and case.dtype != "float32":
                best["dense_below"] = dense_below(case, device)
            if best:
                mine.setdefault(subject.kind, {}).setdefault(subject.where, {}).update(best)
            if subject.kind == "slab" and "fused" in seen:
                wins = path_times.setdefault(subject.where, {})
                wins[case.d_in] = seen["fused"] <= min(seconds, seen["select"])
                won = [d for d, faster in wins.items() if faster]
                mine.setdefault("slab", {}).setdefault(subject.where, {})["largest_fused"] = max(won, default=0)
            (out / "tuning.json").write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        measure.release(device)


def dense_below(case: Case, device: str) -> int:
    """Up to how many latents per entry of a row a product over all of them decodes such rows faster; 0: never."""
    most = 0
    for ratio in DENSE:
        w = Workload(replace(case, d_sae=ratio * case.k), device)
        decode = lambda w=w: sparse_decode.sparse_decode(w.values, w.indices, w.W_dec, None)  # noqa: E731
        times = []
        for limit in (0, ratio):
            with tuning.trying("decode", dense_below=limit):
                times.append(_seconds(decode, device))
        print(f"  decode, {ratio} latents per entry: gathered {1e3 * times[0]:.4g} ms, whole {1e3 * times[1]:.4g} ms")
        if times[1] >= times[0]:
            break
        most = ratio
    return most


def _sweep(subject: Subject, device: str, deadline: float, fields: dict[str, tuple]) -> tuple[dict[str, Any], float]:
    """The fields that beat the plan as it is, and the seconds they take."""
    found: dict[str, Any] = {}
    expected = subject.run()
    best = _seconds(subject.run, device)
    print(f"{subject.kind} {subject.where}: {1e3 * best:.4g} ms with {subject.plan()}", flush=True)
    for field, candidates in fields.items():
        for candidate in candidates:
            if time.time() > deadline or candidate == {**vars(subject.plan()), **found}[field]:
                continue
            with tuning.trying(subject.kind, **found, **{field: candidate}):
                seconds, says = _tried(subject.run, expected, device)
            print(f"  {field} {candidate}: {says}", flush=True)
            if seconds < WORTH * best:
                best, found[field] = seconds, candidate
    return found, best


def _tried(run: Callable[[], tuple[Tensor, ...]], expected: tuple[Tensor, ...], device: str) -> tuple[float, str]:
    """Seconds, infinite where the configuration does not build or is wrong, and a word on it."""
    try:
        got = run()
    except Exception as error:
        return float("inf"), f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    for a, e in zip(got, expected, strict=True):
        off = float((a.double() - e.double()).abs().max() / e.double().abs().max().clamp(min=1e-30))
        if not off <= TOLERANCE:
            return float("inf"), f"wrong: off by {off:.1e} of the largest entry"
    seconds = _seconds(run, device)
    return seconds, f"{1e3 * seconds:.4g} ms"


def _seconds(run: Callable[[], Any], device: str) -> float:
    run()
    samples = [measure.seconds(run, 1, device) for _ in range(ROUNDS if device != "cpu" else 1)]
    return measure.percentile(samples, 0.5)


if __name__ == "__main__":
    compile_candidates(*sys.argv[1:])
