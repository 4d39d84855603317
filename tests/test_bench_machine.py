"""The benchmark suite: what it says of the machine, and what it sets up for the peers."""

import os
from pathlib import Path

import pytest
import torch

from sae_kernels.bench import measure


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
