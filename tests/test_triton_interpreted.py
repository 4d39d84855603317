"""Runs the tests of the Triton kernels in Triton's interpreter, and checks when the backend may be chosen."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae_kernels.ops import _backend

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*args, **environment):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True, cwd=HERE.parent)
    return done.returncode, done.stdout + done.stderr


@needs_triton
@pytest.mark.parametrize(
    "name",
    [
        *("triton_topk_encode", "triton_threshold_encode", "triton_sparse_decode", "triton_sae_loss"),
        *("triton_activation_stats", "gpu_graphs", "gpu_firings", "gpu_refit"),
    ],
)
def test_kernels_in_the_interpreter(name):
    code, out = run("-m", "pytest", "-q", "-x", str(HERE / f"test_{name}.py"), TRITON_INTERPRET="1")
    assert code == 0 and " passed" in out and "skipped" not in out, out


FORCE = "import sys\n{before}\nimport sae_kernels as sk\nwith sk.backend('triton'): pass"


def test_forcing_triton_where_it_cannot_run():
    code, out = run("-c", FORCE.format(before="sys.modules['triton'] = None"))
    assert code == 1 and "ValueError: backend: backend 'triton' cannot run: Triton does not import" in out
    if importlib.util.find_spec("triton") is not None:
        code, out = run("-c", FORCE.format(before=""))
        assert code == 1 and "backend 'triton' cannot run: there is no CUDA device" in out
        code, out = run("-c", FORCE.format(before="") + "\nsk.ActivationStats(4)", TRITON_INTERPRET="1")
        assert code == 0, out
        named = "import sae_kernels as sk; print(sk.info()['backend'])"
        code, out = run("-c", named, TRITON_INTERPRET="1", SAE_KERNELS_BACKEND="triton")
        assert code == 0 and "triton" in out, out
        code, out = run("-c", named, SAE_KERNELS_BACKEND="triton")
        assert code == 1 and "SAE_KERNELS_BACKEND: backend 'triton' cannot run: there is no CUDA device" in out


def test_the_choice_on_cuda(monkeypatch):
    """By the device; the reference only where Triton does not import, with one warning that names the cause."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(_backend, "_warned", False)
    monkeypatch.setattr(_backend, "triton_error", lambda: None)
    assert _backend.pick(cuda) == "triton"
    monkeypatch.setattr(_backend, "triton_error", lambda: "Triton does not import (broken)")
    with pytest.warns(UserWarning, match=r"plain torch reference, which is slow: Triton does not import \(broken\)"):
        assert _backend.pick(cuda) == "reference"
    monkeypatch.setattr(_backend, "_forced", "triton")
    with pytest.raises(ValueError, match="'triton' is forced and the tensors are on cpu"):
        _backend.pick(torch.device("cpu"))


def test_a_kernel_that_does_not_build(monkeypatch):
    """One warning that names the cause, plain torch from then on; forced, it raises; other errors are not caught."""
    monkeypatch.setattr(_backend, "_broken", None)
    error = type("CompilationError", (Exception,), {"__module__": "triton.compiler.errors"})
    calls = []

    def kernel(x):
        calls.append(x)
        raise calls_raise[0]

    calls_raise = [error("no such instruction")]
    run = _backend.triton_or(kernel, lambda x: x + 1)
    x = torch.ones(2)
    with monkeypatch.context() as forced, pytest.raises(error, match="no such instruction"):
        forced.setattr(_backend, "_forced", "triton")
        run(x)
    with pytest.warns(UserWarning, match="cannot build kernel: CompilationError: no such instruction"):
        assert torch.equal(run(x), x + 1)
    assert torch.equal(run(x), x + 1) and len(calls) == 2
    assert "no such instruction" in _backend.triton_error()
    monkeypatch.setattr(_backend, "_broken", None)
    calls_raise[0] = ValueError("of the user's")
    with pytest.raises(ValueError, match="of the user's"):
        run(x)
