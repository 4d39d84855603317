"""Compiles csrc/cuda by nvcc for sm_80, sm_90a and sm_100, with no GPU.

`python tests/cuda_ptxas.py` writes cuda_ptxas.csv beside this file: registers per thread, bytes of shared memory per
block, bytes of stack and of spills. test_cuda_ptxas.py reads it and compiles a sample again.
"""

import csv
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
CODES = ("80", "90a", "100")
TABLE = Path(__file__).with_suffix(".csv")
FIELDS = ("kernel", "arch", "registers", "shared", "stack", "spills")
FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Xptxas=-v"]
ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for .*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill"
    r" stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def compiled(source: Path, code: str) -> list[dict[str, str]]:
    """One row per kernel of `source`."""
    target = f"-gencode=arch=compute_{code},code=sm_{code}"
    include = [f"-I{path}" for path in (ROOT / "csrc", *cpp_extension.include_paths())]
    command = ["nvcc", *FLAGS, target, *include, "-c", source, "-o", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    found = list(ENTRY.finditer(told.stderr))
    names = demangled([entry["kernel"] for entry in found])
    return [_row(entry, name, code) for entry, name in zip(found, names, strict=True)]


def _row(entry: re.Match, name: str, code: str) -> dict[str, str]:
    shared = re.search(r"(\d+) bytes smem", entry["rest"])
    return {
        "kernel": name,
        "arch": code,
        "registers": entry["registers"],
        "shared": shared[1] if shared else "0",
        "stack": entry["stack"],
        "spills": str(int(entry["stores"]) + int(entry["loads"])),
    }


def demangled(names: list[str]) -> list[str]:
    """Without result, arguments and the namespace that they all share."""
    told = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [
        line[: line.rindex("(")].removeprefix("void ").replace("sae_kernels::", "")
        for line in told.stdout.split("\n")
        if line
    ]


def read() -> list[dict[str, str]]:
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    assert shutil.which("nvcc"), "nvcc is not on PATH"
    jobs = [(source, code) for code in CODES for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [row for rows in pool.map(lambda job: compiled(*job), jobs) for row in rows]
    with TABLE.open("w", newline="") as file:
        out = csv.DictWriter(file, FIELDS, lineterminator="\n")
        out.writeheader()
        out.writerows(sorted(rows, key=lambda row: (row["kernel"], CODES.index(row["arch"]))))


if __name__ == "__main__":
    main()
