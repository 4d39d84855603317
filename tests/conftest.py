"""Shared fixtures. On a machine with a compiler the native CPU library must be there, or every test fails."""

import shutil
from pathlib import Path

import pytest
import torch
from kernel_device import device  # noqa: F401, a fixture

from sae_kernels import _native

SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_sessionstart(session):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler and not _native.cpu_loaded():
        cause = f"a compiler is here ({compiler}) and the native CPU library is not: {_native.cpu_error}"
        pytest.exit(cause, returncode=1)


def available_isas() -> list[str]:
    found = []
    for isa in _native.ISAS:
        try:
            if _native.cpu_isa(isa):
                found.append(isa)
        except ValueError:
            pass  # this CPU lacks it
    _native.cpu_isa("auto")
    return found


@pytest.fixture(params=available_isas())
def isa(request):
    """Runs the test once on each instruction set that this CPU has."""
    _native.cpu_isa(request.param)
    yield request.param
    _native.cpu_isa("auto")


@pytest.fixture
def threads():
    """A setter of torch's thread count; the old one comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """Small training runs are quicker so, and many of them at once do not starve one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
