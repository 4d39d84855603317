"""The figures of large-scale work on this machine, each beside its target.

    python -m benchmarks.extraction                                every part but the log
    python -m benchmarks.extraction --part log --threads 2         20 million positions: two forward passes over them
    python -m benchmarks.extraction --part write --part read       some parts

Nothing else should run meanwhile. ml1m: extraction of SASRec's states beside the bare forward pass (needs --shared).
memory: peak of processes that extract 0.5, 1 and 2 million positions. write: a model that does nothing beside a plain
sequential write. read: shuffled epochs beside plain sequential reads. grid: six SAEs on one stream beside their own
runs. plan: predicted steps beside measured ones. log: a synthetic log, its size printed before.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from . import disk, forward, training

PARTS = ("ml1m", "memory", "write", "read", "grid", "plan", "log")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.extraction",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="may be given several times (all but log)")
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="folder of ml1m and models")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the stores go for a while (.)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1: writing has the other cores)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--positions", type=float, default=20e6, help="of the log (20e6)")
    parser.add_argument("--memory-positions", type=float, default=2e6, help="of the largest run of memory (2e6)")
    parser.add_argument("--megabytes", type=int, default=1000, help="that write and read move in a round (1000)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder, rounds = Path(place), options.rounds
        works = {
            "ml1m": lambda: forward.ml1m(options.shared, folder, rounds),
            "memory": lambda: forward.memory(round(options.memory_positions), folder),
            "write": lambda: disk.write(folder, options.megabytes, rounds),
            "read": lambda: disk.read(folder, options.megabytes, rounds),
            "grid": lambda: training.grid(folder, 60, 3),
            "plan": training.plan,
            "log": lambda: forward.log(options.positions, folder),
        }
        for part in options.part or PARTS[:-1]:
            works[part]()


if __name__ == "__main__":
    main()
