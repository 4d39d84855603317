"""The table of compiled Triton kernels: complete, without spills, small enough for the chips; a sample is compiled
again.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia")

HERE = Path(__file__).parent
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # what one block may ask for

RUN = """
import triton_aot as aot
cases = {(case[0].__name__, aot.configuration(*case)): case for case in aot.kernels()}
listed = {(r["kernel"], r["configuration"], int(r["arch"])) for r in aot.read()}
wanted = {(*name, arch) for name in cases for arch in aot.ARCHS}
assert listed == wanted, "the table is out of date: run tests/triton_aot.py"
"""
SAMPLE = """
for kernel in ("filter_product", "filter_slab", "rank", "decode", "sum_chunks", "dot_rows", "grad_chunks"):
    case = next(c for name, c in cases.items() if name[0] == kernel)
    for arch in (aot.ARCHS if kernel == "filter_product" else (90,)):
        found = aot.compiled(*case, arch)
        print(kernel, arch, found["stack"], found["shared"])
"""


def run(code: str) -> str:
    """In a process of its own: the interpreter must be off while the kernels are imported."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", RUN + code], env=environment, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table() -> list[dict[str, str]]:
    lines = (HERE / "triton_aot.csv").read_text().splitlines()
    return [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]


def test_no_configuration_spills_or_outgrows_a_chip():
    rows = table()
    assert {r["kernel"] for r in rows} >= {"filter_product", "filter_slab", "rank", "decode", "sum_chunks"}
    for row in rows:
        assert row["stack"] == "0" and 0 < int(row["registers"]) <= 255, row
        assert int(row["shared"]) <= SHARED_BYTES[int(row["arch"])], row


def test_the_table_is_complete_and_a_sample_compiles_again():
    lines = run(SAMPLE).splitlines()
    assert len(lines) == 9
    for line in lines:
        _, arch, stack, shared = line.split()
        assert stack == "0" and int(shared) <= SHARED_BYTES[int(arch)], line
