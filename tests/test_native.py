"""Which backend runs, and that the library works where there is no native one."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

import sae_kernels as sk
from sae_kernels import _native
from sae_kernels.ops import _backend

ENCODE = """
import warnings, torch
warnings.simplefilter("error" if {strict} else "always")
import sae_kernels as sk
x, W = torch.ones(2, 3), torch.eye(3)
for _ in range(2):
    print(sk.topk_encode(x, W, None, 2)[1].tolist())
"""


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done.stdout, done.stderr


def test_cpu_tensors_take_the_native_library():
    assert _backend.pick(torch.device("cpu")) == "cpu"
    out, err = python(ENCODE.format(strict=True))
    assert out == "[[0, 1], [0, 1]]\n" * 2 and not err


def test_without_the_library_the_reference_runs_with_one_warning():
    out, err = python(ENCODE.format(strict=False), SAE_KERNELS_NATIVE="0")
    assert out == "[[0, 1], [0, 1]]\n" * 2
    assert err.count("plain torch reference, which is slow: switched off by SAE_KERNELS_NATIVE=0") == 1


def test_forced_backends():
    with sk.backend("reference"):
        assert _backend.pick(torch.device("cpu")) == "reference"
        with sk.backend("auto"):
            assert _backend.pick(torch.device("cpu")) == "cpu"
    assert _backend.pick(torch.device("cpu")) == "cpu"
    for name, message in (
        ("gpu", "unknown backend 'gpu'; choose from auto"),
        ("cuda", "'cuda' cannot run: the CUDA library is not built"),
    ):
        with pytest.raises(ValueError, match=message), sk.backend(name):
            pass
    with sk.backend("cpu"), pytest.raises(ValueError, match="forced and the tensors are on meta"):
        sk.topk_encode(torch.ones(2, 3, device="meta"), torch.ones(3, 3, device="meta"), None, 1)
    _, err = python("import sae_kernels", SAE_KERNELS_BACKEND="nonsense")
    assert "SAE_KERNELS_BACKEND: unknown backend 'nonsense'" in err
    _, err = python("import sae_kernels", SAE_KERNELS_BACKEND="cpu", SAE_KERNELS_NATIVE="0")
    assert "backend 'cpu' cannot run: the native library is switched off" in err


def test_other_devices_take_the_reference_with_the_cause():
    _backend._warned = False
    with pytest.warns(UserWarning, match="no kernels for meta"):
        values, indices = sk.topk_encode(torch.ones(2, 3, device="meta"), torch.ones(4, 3, device="meta"), None, 2)
    assert values.shape == indices.shape == (2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.topk_encode(torch.ones(2, 3, device="meta"), torch.ones(4, 3, device="meta"), None, 2)


def test_instruction_sets():
    assert _native.cpu_isa("generic") == "generic" == _native.cpu_isa()
    assert _native.cpu_isa("auto") in _native.ISAS
    with pytest.raises(ValueError, match="'sse9' is unknown; choose from generic"):
        _native.cpu_isa("sse9")


def test_import_needs_torch_alone():
    heavy = ["numpy", "pandas", "pyarrow", "tqdm", "safetensors", "plotly", "scipy", "triton"]
    _, err = python(f"import sys, torch\nfor name in {heavy}:\n    sys.modules[name] = None\nimport sae_kernels")
    assert not err


STEP = """
import resource, torch, sae_kernels as sk
rows, d_in, d_sae, k = 65536, 256, 16384, 32
torch.manual_seed(0)
x = torch.randn(rows, d_in)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
{step}
step(x[:64])  # the gradients stand from here on
before = peak()
kept = step(x)
print(peak() - before - sum(t.numel() * t.element_size() for t in kept) / 2**20)
"""
OPS = """
W_enc, W_dec = (torch.randn(d_sae, d_in).mul_(d_in**-0.5).requires_grad_() for _ in range(2))
b_enc, b_dec = torch.zeros(d_sae, requires_grad=True), torch.zeros(d_in, requires_grad=True)
grad = torch.randn(rows, d_in)
def step(x):
    values, indices = sk.topk_encode(x, W_enc, b_enc, k)
    y = sk.sparse_decode(values, indices, W_dec, b_dec)
    y.backward(grad[: len(x)])
    return values, indices, y
"""
MODULE = """
sae = sk.TopKSAE(d_in, d_sae, k)
def step(x):
    out = sae.loss(x)
    out.loss.backward()
    return out.code.values, out.code.indices
"""


@pytest.mark.parametrize("step", [OPS, MODULE], ids=["ops", "module"])
def test_memory_of_a_training_step(step):
    """rows x d_sae would be 4 GiB. Beyond inputs, gradients and outputs at most 64 MiB may come."""
    out, err = python(STEP.format(step=step), MALLOC_MMAP_THRESHOLD_="65536")
    assert not err
    assert float(out) < 64
