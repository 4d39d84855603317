"""Finds and loads the native libraries, one for the CPU and one for CUDA; says why not when one is absent."""

import ctypes
import os
from pathlib import Path

import torch

ISAS = ("generic", "avx2", "avx512", "avx512_bf16")

_here = Path(__file__).parent


def _load(stem: str) -> ctypes.CDLL | str:
    """The library, or why it is not there."""
    if os.environ.get("SAE_KERNELS_NATIVE") == "0":
        return "switched off by SAE_KERNELS_NATIVE=0"
    found = sorted(_here.glob(f"{stem}*.so"))
    if not found:
        note = _here / f"{stem}.txt"
        unbuilt = "not built: no compiler or no torch was there at install time"
        return note.read_text().strip() if note.is_file() else unbuilt
    try:
        torch.ops.load_library(found[-1])
        return ctypes.CDLL(str(found[-1]))
    except OSError as error:
        return f"{found[-1].name} does not load: {error}"


def _split(loaded: ctypes.CDLL | str) -> tuple[ctypes.CDLL | None, str | None]:
    return (None, loaded) if isinstance(loaded, str) else (loaded, None)


_handle, cpu_error = _split(_load("_C_cpu"))
_, cuda_error = _split(_load("_C_cuda"))
cuda_runs_on = "cuda"  # the tests build the same kernels for "cpu"


def cpu_loaded() -> bool:
    return _handle is not None


def cpu_isa(force: str | None = None) -> str | None:
    """The instruction set the CPU kernels run on; `force` names another one, "auto" returns to the best.

    Returns None where the native library is absent. Raises ValueError for a name unknown or lacking here.
    """
    if _handle is None:
        return None
    if force is not None:
        if force not in (*ISAS, "auto"):
            raise ValueError(f"instruction set {force!r} is unknown; choose from {', '.join((*ISAS, 'auto'))}")
        if _handle.sae_kernels_cpu_isa(-1 if force == "auto" else ISAS.index(force)) < 0:
            raise ValueError(f"instruction set {force!r} is not available on this CPU or in this build")
    return ISAS[_handle.sae_kernels_cpu_isa(-2)]
