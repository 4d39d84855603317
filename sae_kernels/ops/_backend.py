"""Which backend runs an op: by the tensor's device, unless one is forced."""

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch

from .. import _native

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    if name == "cpu" and not _native.cpu_loaded():
        raise ValueError(f"{origin}: backend 'cpu' cannot run: the native library is {_native.cpu_error}")
    if name in ("triton", "cuda"):
        raise ValueError(f"{origin}: backend {name!r} cannot run: this version has no {name} kernels")
    return name


_forced = _checked(os.environ.get("SAE_KERNELS_BACKEND", "auto"), "SAE_KERNELS_BACKEND")
_warned = False


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces one backend for every op inside the `with` block, in all threads.

    name: "auto" (by the tensor's device), "reference", "cpu", "triton" or "cuda".
    Raises ValueError where the name is unknown or that backend cannot run here.
    """
    global _forced
    before, _forced = _forced, _checked(name, "backend")
    try:
        yield
    finally:
        _forced = before


def pick(device: torch.device) -> str:
    """The backend for tensors on `device`: the forced one, else the native one of that device, else the reference."""
    global _warned
    if _forced == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' is forced and the tensors are on {device}")
    if _forced != "auto":
        return _forced
    if device.type == "cpu" and _native.cpu_loaded():
        return "cpu"
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        cause = _native.cpu_error if device.type == "cpu" else f"this version has no kernels for {device.type}"
        warnings.warn(f"sae_kernels runs its plain torch reference, which is slow: {cause}", stacklevel=3)
    return "reference"
