"""The benchmark suite: what it says of the machine, and what it sets up for the peers."""

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae_kernels.bench import Case, measure
from sae_kernels.bench.cases import least_bytes


def cpuinfo(monkeypatch, text):
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return measure.device_name("cpu")


def test_a_cpu_is_named_by_its_model(monkeypatch):
    first = "processor : 0\ncpu family\t: 6\nmodel\t\t: 85\nmodel name\t: Xeon Gold 6150 CPU\n"
    text = first + "\nprocessor : 1\nmodel name : x\n"
    assert cpuinfo(monkeypatch, text) == "Xeon Gold 6150 CPU, 2 threads"


def test_a_name_without_a_number_gets_family_and_model(monkeypatch):
    name = cpuinfo(monkeypatch, "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n")
    assert name == "AMD EPYC family 26 model 2, 2 threads"
    assert measure.slug(name) == "amd-epyc-family-26-model-2-2-threads"


def test_without_the_file_it_is_a_cpu(monkeypatch):
    assert cpuinfo(monkeypatch, "") == "cpu, 2 threads"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU sparsify keeps its Triton decoder")
def test_sparsify_decodes_without_triton_on_a_cpu():
    """It reads the switch when it is imported, so that has to be set before any provider is built."""
    import sae_kernels.bench.peers  # noqa: F401

    assert os.environ["SPARSIFY_DISABLE_TRITON"] == "1"


def test_a_bandwidth_bound_op_is_measured_against_the_copy():
    case, limit = Case("c", 1000, 100, 2000, 10), measure.Ceilings(copy=1e10, product=1e11)
    assert limit.least_seconds("sparse_decode", "forward", case) == least_bytes("sparse_decode", "forward", case) / 1e10
    slow_cache = replace(limit, cache=1e9)  # k rows of 4-byte weights for each row
    assert slow_cache.least_seconds("sparse_decode", "forward", case) == case.rows * case.k * case.d_in * 4 / 1e9
    assert slow_cache.least_seconds("topk_encode", "forward", case) == limit.least_seconds(
        "topk_encode", "forward", case
    )


def test_ceilings_are_rates_of_this_machine():
    limits = measure.ceilings({"bfloat16"}, size=256, mib=4)
    assert set(limits) == {"float32", "bfloat16"}
    assert all(1e8 < limit.copy < 1e13 and 1e8 < limit.product < 1e15 for limit in limits.values())
    assert limits["bfloat16"].product >= limits["float32"].product
    assert limits["float32"].cache == math.inf  # of a GPU alone
    assert 1e8 < measure._cache_rate("cpu", mib=1, times=4) < 1e13
