"""Lines of the report, and times of things that are measured in turn."""

import resource
import statistics
import time
from collections.abc import Callable, Sequence

Seconds = tuple[float, float]


def say(what: str, value: str, target: str = "", met: bool | None = None) -> None:
    verdict = {None: "", True: "met", False: "NOT MET"}[met]
    print(f"{what:<66} {value:<44} {target:<16} {verdict}".rstrip(), flush=True)


def at_most(what: str, value: float, bound: float, note: str = "") -> None:
    say(what, f"{value:.3f} {note}", f"<= {bound:.2f}", value <= bound)


def at_least(what: str, value: float, bound: float, note: str = "") -> None:
    say(what, f"{value:.3f} {note}", f">= {bound:.2f}", value >= bound)


def timed(work: Callable[[], object]) -> Seconds:
    """Wall and CPU seconds; those of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def in_turn(works: Sequence[Callable[[], object]], rounds: int, before: Callable[[], object] = int) -> list[list]:
    """For each work, its Seconds in every round; before() runs ahead of each."""
    table: list[list[Seconds]] = [[] for _ in works]
    for _ in range(rounds):
        for work, taken in zip(works, table, strict=True):
            before()
            taken.append(timed(work))
    return table


def ratio(these: Sequence[Seconds], those: Sequence[Seconds], which: int = 0) -> tuple[float, str]:
    """The median over rounds of these / those (0: wall, 1: CPU), and its spread as text."""
    found = sorted(a[which] / b[which] for a, b in zip(these, those, strict=True))
    return statistics.median(found), f"({found[0]:.2f} to {found[-1]:.2f} in {len(found)} rounds)"


def middle(taken: Sequence[Seconds], which: int = 0) -> float:
    return statistics.median(seconds[which] for seconds in taken)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
