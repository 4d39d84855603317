"""What a training run over many rows takes: bytes, hours, what they go into, and where more processes stop helping.

A step of b rows costs one process, in seconds, step + mac * b d_in d_sae + latent * b d_sae (the encoder's product, and
the choice among its results) + slot * b k + number * b k d_in (sorting what was chosen, and the sparse products) +
weight * 2 d_in d_sae (Adam). Communication is added to that; reading goes on meanwhile.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .nn import TopKSAE
from .train.member import Member
from .train.ranks import Ranks
from .train.recipe import Recipe


@dataclass(frozen=True)
class Costs:
    """Seconds per step, per multiply-add of the encoder, per latent of a row, per chosen latent of a row, per number of
    a chosen latent's weights, per weight; and where they come from."""

    step: float
    mac: float
    latent: float
    slot: float
    number: float
    weight: float
    source: str


@dataclass(frozen=True)
class Rates:
    """Bytes per second: of storage per node of `per_node` processes, between processes of a node, between nodes."""

    storage: float = 10e9
    within: float = 450e9
    between: float = 50e9
    per_node: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")


@dataclass(frozen=True)
class Job:
    """rows of d_in numbers of `item` bytes, `epochs` times, through an SAE of d_sae and k, batch_size rows a step."""

    rows: int
    d_in: int
    d_sae: int
    k: int
    batch_size: int = 65536
    epochs: float = 1.0
    item: int = 2

    def __post_init__(self) -> None:
        for name in ("rows", "d_in", "d_sae", "k", "batch_size", "item"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.k > self.d_sae:
            raise ValueError(f"k {self.k} must be at most d_sae {self.d_sae}")
        if not self.epochs > 0:
            raise ValueError(f"epochs must be above 0, got {self.epochs}")


# 989 TFLOP/s dense bf16 and 4.8 TB/s; in 4 bytes each, a pre-activation is written and read, a chosen latent goes 40
# times through memory while it is sorted, a number of its weights 6 times, a weight with its gradient and Adam's two
# moments 8 times; a step launches a hundred kernels of 5 us
DATASHEET = "an estimate from the H200 datasheet's peaks, every access to memory counted; nothing of it is measured"
H200 = Costs(5e-4, 2 / 989e12, 8 / 4.8e12, 160 / 4.8e12, 24 / 4.8e12, 32 / 4.8e12, DATASHEET)

# rows, d_in, d_sae, k: each cost stands out in one of them
CALIBRATION = (
    (64, 16, 64, 4),
    (2048, 64, 1024, 8),
    (2048, 16, 4096, 4),
    (512, 256, 4096, 8),
    (512, 512, 1024, 16),
    (2048, 64, 256, 64),
    (2048, 16, 512, 64),
    (1024, 256, 512, 64),
    (32, 256, 8192, 8),
    (1024, 128, 2048, 32),
)
MOST = 4096
CHECKS = ((1024, 64, 2048, 16), (1024, 256, 2048, 32), (256, 512, 8192, 32))


def plan(job: Job, processes: int, costs: Costs = H200, rates: Rates | None = None) -> dict[str, Any]:
    """The fastest way to spread `job`: over how many processes its latents (shards), hours, seconds of a step by what
    they go into, the largest of these (driver), bytes per process and of the store.

    Raises ValueError where the batch has fewer rows than there are processes.
    """
    if processes < 1 or job.batch_size < processes:
        raise ValueError(f"processes must be between 1 and the {job.batch_size} rows of a batch, got {processes}")
    ways = [_spread(job, processes, shards, costs, rates or Rates()) for shards in _divisors(processes, job)]
    return min(ways, key=lambda way: way["hours"])


def saturation(job: Job, costs: Costs = H200, rates: Rates | None = None, most: int = MOST) -> int | None:
    """From how many processes on (a power of two) twice as many are less than 1.25 times as fast; None where that is
    not so up to `most` of them, or to the rows of a batch."""
    processes = 1
    while 2 * processes <= min(most, job.batch_size):
        here, there = (plan(job, n, costs, rates)["hours"] for n in (processes, 2 * processes))
        if here < 1.25 * there:
            return processes
        processes *= 2
    return None


def _divisors(processes: int, job: Job) -> list[int]:
    return [n for n in range(1, processes + 1) if processes % n == 0 and job.d_sae % n == 0 and job.k <= job.d_sae // n]


def _spread(job: Job, processes: int, shards: int, costs: Costs, rates: Rates) -> dict[str, Any]:
    copies, weights = processes // shards, 2 * job.d_in * job.d_sae / shards
    rows = job.batch_size / copies
    link = rates.within if shards <= rates.per_node else rates.between
    between_copies = rates.within if processes <= rates.per_node else rates.between
    # ring sums move 2 (n - 1) / n of a tensor past each process; candidates are gathered in 4 bytes
    summed = 2 * (shards - 1) / shards * rows * job.d_in * 4 + (shards - 1) * rows * job.k * 4
    gradients = 2 * (copies - 1) / copies * weights * 4
    nodes = -(-processes // rates.per_node)
    seconds = {
        "overhead": costs.step,
        "encoder": costs.mac * rows * job.d_in * job.d_sae / shards,
        "choice": costs.latent * rows * job.d_sae / shards,
        "sparse": (costs.slot + costs.number * job.d_in) * rows * job.k / shards,
        "adam": costs.weight * weights,
        "latents between processes": summed / link,
        "gradients between processes": gradients / between_copies,
        # each process of a node that shares latents has the same rows, read once
        "storage": job.batch_size * job.d_in * job.item / (rates.storage * min(nodes, copies)),
    }
    working = sum(time for name, time in seconds.items() if name != "storage")
    step = max(working, seconds["storage"])
    return {
        "processes": processes,
        "shards": shards,
        "hours": step * job.epochs * job.rows / job.batch_size / 3600,
        "step_seconds": step,
        "driver": "storage" if seconds["storage"] > working else max(seconds, key=_without_storage(seconds)),
        "seconds": seconds,
        # weights, gradients and two moments in 4 bytes, a copy in 2; the batch, its reconstruction and its code
        "process_bytes": int(18 * weights + rows * (12 * job.d_in + 16 * job.k)),
        "store_bytes": job.rows * (job.d_in * job.item + 8),
    }


def _without_storage(seconds: dict[str, float]) -> Callable[[str], float]:
    return lambda name: -1.0 if name == "storage" else seconds[name]


def measure(
    steps: int = 6, device: torch.device | str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> Costs:
    """Costs on this machine, from a few steps of ten sizes: relative least squares, no cost below 0."""
    taken = torch.tensor([_seconds(*size, steps, device, clock) for size in CALIBRATION], dtype=torch.float64)
    features = torch.tensor([_features(*size) for size in CALIBRATION], dtype=torch.float64) / taken[:, None]
    scale = features.norm(dim=0)
    used = list(range(features.shape[1]))
    while True:
        found = torch.linalg.lstsq(features[:, used] / scale[used], torch.ones(len(taken), 1).double()).solution[:, 0]
        if bool((found >= 0).all()):
            break
        used.pop(int(found.argmin()))
    costs = torch.zeros(features.shape[1], dtype=torch.float64)
    costs[used] = found / scale[used]
    return Costs(*costs.tolist(), f"measured here on {device}, {torch.get_num_threads()} threads")


def predicted(costs: Costs, rows: int, d_in: int, d_sae: int, k: int) -> float:
    """Seconds of a step of one process."""
    values = asdict(costs)
    return sum(values[name] * x for name, x in zip(values, _features(rows, d_in, d_sae, k), strict=False))


def check(
    costs: Costs, steps: int = 12, device: torch.device | str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> list[tuple[tuple[int, int, int, int], float, float]]:
    """(size, predicted, measured seconds of a step) for three sizes that `measure` has not seen."""
    return [(size, predicted(costs, *size), _seconds(*size, steps, device, clock)) for size in CHECKS]


def _features(rows: int, d_in: int, d_sae: int, k: int) -> tuple[float, ...]:
    counts = (1, rows * d_in * d_sae, rows * d_sae, rows * k, rows * k * d_in, 2 * d_in * d_sae)
    return tuple(float(count) for count in counts)


def _seconds(rows: int, d_in: int, d_sae: int, k: int, steps: int, device: Any, clock: Callable[[], float]) -> float:
    """The median time of a training step, after two that warm up."""
    generator = torch.Generator().manual_seed(0)
    sae = TopKSAE(d_in, d_sae, k, normalize="standardize", generator=generator)
    recipe = Recipe(100, rows, 1e-3, (0.9, 0.999), 0.0, 0.0, 1.0, 0, 50, None, None, None, "calibration")
    batch, taken = torch.randn(rows, d_in, generator=generator).to(device), []
    with Member(sae, recipe, Ranks(), torch.device(device)) as member:
        for step in range(steps + 2):
            started = clock()
            member.step(batch)
            if batch.is_cuda:
                torch.cuda.synchronize(batch.device)
            if step >= 2:
                taken.append(clock() - started)
    return sorted(taken)[len(taken) // 2]
