"""csrc/cuda compiled by g++ for the CPU: the headers of cuda_host stand in for CUDA's own."""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from sae_kernels.cuda import sparse_decode, topk_encode  # noqa: F401  the schemas that the library implements

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
def load() -> None:
    """Registers the kernels and their launchers for CPU tensors."""
    folder = Path(tempfile.mkdtemp(prefix="sae_kernels_cuda_host"))
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
    torch.ops.load_library(library)
    shutil.rmtree(folder)
