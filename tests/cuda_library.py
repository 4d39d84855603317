"""Where the tests of the CUDA kernels run: on the GPU where there is one and the CUDA library, else on the CPU, for
which g++ compiles csrc/cuda with the headers of cuda_host in the place of CUDA's own.
"""

import atexit
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from sae_kernels import _native
from sae_kernels.cuda import activation_stats, batch_topk_encode, sparse_decode, topk_encode  # noqa: F401  the schemas

DEVICE = "cuda" if torch.cuda.is_available() and _native.cuda_error is None else "cpu"
ROOT = Path(__file__).parents[1]
HOST = ROOT / "tests" / "cuda_host"
FLAGS = ["-std=c++20", "-pthread", "-Wall", "-Wno-unknown-pragmas", f"-I{HOST}"]
TARGET = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DSK_DEVICE=CPU", "-include", str(HOST / "stream.h")]


def compiler() -> str:
    """The C++ compiler, or a skip where there is none."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("no g++")
    return found


@functools.cache
def build() -> Path:
    """The kernels and their launchers as a library for CPU tensors; it lasts as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix="sae_kernels_cuda_host"))
    atexit.register(shutil.rmtree, folder)
    include = [f"-I{path}" for path in (ROOT / "csrc", *cpp_extension.include_paths())]
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    running = [
        subprocess.Popen([compiler(), *FLAGS, *TARGET, *include, "-O0", "-fPIC", "-c", "-x", "c++", source, "-o", out])
        for source, out in zip(sources, objects, strict=True)
    ]
    assert not any([process.wait() for process in running]), "csrc/cuda does not compile for the CPU"
    library = folder / "cuda_host.so"
    torch_at = [f"-L{path}" for path in cpp_extension.library_paths()]
    link = ["-shared", "-pthread", *objects, *torch_at, "-ltorch_cpu", "-lc10", "-o", library]
    subprocess.run([compiler(), *link], check=True)
    return library


@functools.cache
def load_for_cpu() -> None:
    torch.ops.load_library(build())


def load() -> None:
    """Makes the kernels ready to run on DEVICE."""
    if DEVICE == "cpu":
        load_for_cpu()


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU are taken for those of a GPU that has the CUDA library."""
    monkeypatch.setattr(_native, "cuda_error", None)
    monkeypatch.setattr(_native, "cuda_runs_on", "cpu")


def call(function: Callable, *args: Any, **options: Any) -> Any:
    """The function's results for tensors on the CPU, computed on DEVICE."""
    results = function(*[a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args], **options)
    if isinstance(results, torch.Tensor):
        return results.cpu()
    return [None if r is None else r.cpu() for r in results]
