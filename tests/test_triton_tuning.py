"""Configurations of the Triton kernels: the measured table, and compile keys that the number of rows is no part of."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from sae_kernels.kernels import tuning  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A table in which a GPU called "fast" has been tuned, and that GPU."""
    fields = {"decode": {"2:64": {"ROWS": 8, "warps": 2}}, "slab": {"2": {"largest_fused": 100}}}
    (tmp_path / "tuning.json").write_text(json.dumps({"fast": fields}))
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "tuning.json")
    name = ["fast"]
    monkeypatch.setattr(tuning, "gpu", lambda: name[0])
    tuning.table.cache_clear()
    yield name
    monkeypatch.undo()
    tuning.table.cache_clear()


def test_the_table_is_read_by_gpu_and_bucket(measured):
    plan = tuning.decode_plan(50, 2)
    assert (plan.ROWS, plan.warps, plan.UNROLL, plan.BLOCK_D) == (8, 2, 4, 64)
    assert tuning.decode_plan(65, 2).ROWS == tuning.decode_plan(50, 4).ROWS == 4
    assert tuning.slab_plan(2).largest_fused == 100 and tuning.slab_plan(4).largest_fused == 512
    measured[0] = "unknown"
    assert tuning.decode_plan(50, 2).ROWS == 4 and tuning.slab_plan(2).largest_fused == 512


def test_a_measured_threshold_changes_the_path(measured):
    import torch

    from sae_kernels.kernels.topk_encode import pick

    assert pick(101, 16384, 32, False, torch.bfloat16) == "slab"
    assert pick(100, 16384, 32, False, torch.bfloat16) == "fused"
    measured[0] = "unknown"
    assert pick(101, 16384, 32, False, torch.bfloat16) == "fused"


def test_trying_a_configuration():
    with tuning.trying("sums", ENTRIES=32), tuning.trying("sums", warps=2):
        assert (tuning.sums_plan(64, 2).ENTRIES, tuning.sums_plan(64, 2).warps) == (32, 2)
        assert tuning.decode_plan(64, 2) == tuning.DecodePlan(4, 64, 4, 4)
    assert tuning.sums_plan(64, 2) == tuning.SumsPlan(16, 64, 1)
    with tuning.trying("fused", GROWTH=4):
        plan = tuning.fused_plan(64, 4096, 32, 2)
        assert plan.GROWTH == 4 and plan.first_step in (4, 16) and plan.room == 2 * 32 * 3 + 24
    with pytest.raises(TypeError), tuning.trying("sums", NO_SUCH=1):
        tuning.sums_plan(64, 2)


def test_buckets():
    assert [tuning.bucket(d, 2) for d in (1, 32, 33, 64, 4096, 9999)] == [
        "2:32",
        "2:32",
        "2:64",
        "2:64",
        "2:4096",
        "2:4096",
    ]


def test_every_measured_plan_is_one_that_the_code_has():
    kinds = {
        "fused": tuning.Tile, "select": tuning.SelectPlan, "slab": tuning.SlabPlan, "decode": tuning.DecodePlan,
        "sums": tuning.SumsPlan, "dot": tuning.DotPlan,
    }  # fmt: skip
    for gpu in json.loads((ROOT / "sae_kernels/kernels/tuning.json").read_text()).values():
        for kind, buckets in gpu.items():
            for fields in buckets.values():
                assert fields.keys() <= kinds[kind].__dataclass_fields__.keys()


# every launch is recorded by the key under which Triton would compile it for a GPU, and not made
KEYS = """
import json
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from sae_kernels.kernels import topk_encode, sparse_decode, latent_sums, tuning
from sae_kernels.ops import _stats_gpu
from sae_kernels.ops.activation_stats import ActivationStats

backend, found = make_backend(GPUTarget("cuda", 90, 32)), {}

def record(self, *args, grid, warmup, **kwargs):
    binder = create_function_from_signature(self.signature, self.params, backend)
    _, specialization, options = binder(*args, **kwargs)
    found.setdefault(self.fn.__name__, set()).add(str((specialization, sorted(options.items()))))

JITFunction.run = record
tuning.SlabPlan.nbytes = nbytes = 2**20  # so that many rows make several chunks
tuning.slab_plan = lambda size: tuning.SlabPlan(nbytes=nbytes)
tuning.GROUP_BYTES = 2**20

def everything(rows, d_in, d_sae, k):
    x, W, b = torch.ones(rows, d_in).bfloat16(), torch.ones(d_sae, d_in).bfloat16(), torch.ones(d_sae).bfloat16()
    for path in ("fused", "slab", "sort"):
        values, indices = topk_encode.topk_encode(x, W, b, k, 0, None, path)
    indices.random_(d_sae)
    sparse_decode.sparse_decode(values, indices, W, None)
    sparse_decode.grad_values(x, indices, W)
    latent_sums.latent_sums(indices, values, x, d_sae, with_totals=True, W=W)
    stats = ActivationStats(d_sae, histogram=True, top=5, cooccurrence=True)
    stats._run_on_gpu(_stats_gpu.KERNELS["triton"], values, indices, None, None)
"""
COUNT = """
for d_in, d_sae, k in ((16, 1024, 8), (17, 1031, 5)):
    found.clear()
    for rows in {rows}:
        everything(rows, d_in, d_sae, k)
        counts = {{name: len(keys) for name, keys in found.items()}}
        print(json.dumps([d_sae, counts]))
"""


def test_the_number_of_rows_is_no_part_of_a_compile_key():
    """One batch size compiles as many variants as many do, whatever it is divisible by."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    code = KEYS + COUNT.format(rows=(1, 16, 129, 700))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    counted = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(counted) == 8 and all(
        counts.keys() >= {"filter_product", "sum_chunks", "add_entries", "merge_candidates"} for _, counts in counted
    )
    for d_sae in (1024, 1031):
        counts = [counts for size, counts in counted if size == d_sae]
        assert counts[-1] == counts[0], f"d_sae {d_sae}: {counts}"
