"""Finds and loads the native CPU library; says why not when it is absent."""

import ctypes
import os
from pathlib import Path

import torch

ISAS = ("generic", "avx2", "avx512")

_here = Path(__file__).parent
_handle: ctypes.CDLL | None = None
cpu_error: str | None = None


def _load() -> None:
    global _handle, cpu_error
    if os.environ.get("SAE_KERNELS_NATIVE") == "0":
        cpu_error = "switched off by SAE_KERNELS_NATIVE=0"
        return
    found = sorted(_here.glob("_C_cpu*.so"))
    if not found:
        note = _here / "_native_build.txt"
        unbuilt = "not built: no compiler or no torch was there at install time"
        cpu_error = note.read_text().strip() if note.is_file() else unbuilt
        return
    try:
        torch.ops.load_library(found[-1])
        _handle = ctypes.CDLL(str(found[-1]))
    except OSError as error:
        cpu_error = f"{found[-1].name} does not load: {error}"


_load()


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
