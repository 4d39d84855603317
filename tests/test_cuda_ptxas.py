"""The table of compiled CUDA kernels: complete, without spills, small enough for the chips; a sample compiles again."""

import shutil
import subprocess

import cuda_library
import cuda_ptxas
import pytest

SHARED_BYTES = 48 * 1024  # static shared memory of a block, on every chip
PER_SM = 65536  # registers
ALONE = ("add_entries", "mark_fired")  # a block of them has a multiprocessor to itself


def threads(kernel: str) -> int:
    """Of a block."""
    if kernel.startswith("select_passing"):
        return 32 * int(kernel.split("ThresholdPlan<")[1].split(",")[0])
    if kernel.startswith("select_rows"):
        team, rows = kernel.split("SelectPlan<")[1].split(", ")[:2]
        return int(team) * int(rows)
    if kernel.startswith(ALONE):
        return 1024
    if kernel.startswith("topk_encode_rows"):
        return 256  # and more, where fewer registers are left to each
    if kernel.startswith("guess_from"):
        return 32
    return 256 if kernel.startswith(("write_", "carry_", "count_", "mark_", "merge_", "sample_")) else 128


def test_no_kernel_spills_or_outgrows_a_chip():
    for row in cuda_ptxas.read():
        assert row["stack"] == row["spills"] == "0", row
        assert 0 < int(row["registers"]) <= 255 and int(row["shared"]) <= SHARED_BYTES, row
        alone = row["kernel"].startswith((*ALONE, "topk_encode_rows"))  # by their launch bounds
        blocks = 1 if alone else 2
        assert blocks * threads(row["kernel"]) * int(row["registers"]) <= PER_SM, row


def test_the_table_holds_every_kernel():
    """Those that g++ has compiled into the library for the CPU."""
    told = subprocess.run(["nm", cuda_library.build()], capture_output=True, text=True, check=True).stdout
    names = [
        line.split()[-1] for line in told.splitlines() if "Args" in line and line.split()[-1].startswith("_ZN11sae_k")
    ]
    kernels = {n for n in cuda_ptxas.demangled(names) if n.split("<")[0] in KERNELS}
    assert {n.split("<")[0] for n in kernels} == KERNELS
    assert {(row["kernel"], row["arch"]) for row in cuda_ptxas.read()} == {
        (k, c) for k in kernels for c in cuda_ptxas.CODES
    }


KERNELS = {
    "arrange_weights",
    "topk_encode_rows",
    "topk_encode_panels",
    "select_rows",
    "select_passing",
    "write_keys",
    "write_codes",
}
KERNELS |= {"decode_rows", "dot_rows", "sum_runs", "join_runs"}
KERNELS |= {"add_entries", "carry_limbs", "count_bins", "count_pairs"}
KERNELS |= {"mark_candidates", "merge_candidates", "mark_fired"}
KERNELS |= {"count_digits", "choose_digit", "split_rows", "write_kept", "merge_strips"}
KERNELS |= {"sample_rows", "guess_from"}
SAMPLE = """
#include "cuda/latent_sums.cuh"
#include "cuda/topk_select.cuh"
namespace sae_kernels {
template __global__ void select_rows<SelectTo32, 4, kRelu>(SelectArgs);
template __global__ void sum_runs<bf16, int32_t, 8>(SumArgs<bf16, int32_t>);
}
"""


def test_a_sample_compiles_again_and_is_as_the_table_says(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    source = tmp_path / "sample.cu"
    source.write_text(SAMPLE)
    rows = cuda_ptxas.compiled(source, "90a")
    assert len(rows) == 2
    table = cuda_ptxas.read()
    for row in rows:
        assert row["spills"] == "0"
        listed = next(r for r in table if (r["kernel"], r["arch"]) == (row["kernel"], "90a"))
        assert row["shared"] == listed["shared"]  # registers may differ by the version of the compiler
