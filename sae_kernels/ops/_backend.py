"""Which backend runs an op: by the tensor's device, unless one is forced."""

import contextlib
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import _native

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
_broken: str | None = None  # why Triton could not build a kernel in this process


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    if name == "cpu" and not _native.cpu_loaded():
        raise ValueError(f"{origin}: backend 'cpu' cannot run: the native library is {_native.cpu_error}")
    if name == "cuda":
        missing = cuda_error() or (None if _cuda_devices() else "there is no CUDA device")
        if missing:
            raise ValueError(f"{origin}: backend 'cuda' cannot run: {missing}")
    if name == "triton":
        missing = triton_error() or (None if interpreted() or torch.cuda.is_available() else "there is no CUDA device")
        if missing:
            raise ValueError(f"{origin}: backend 'triton' cannot run: {missing}")
    return name


def interpreted() -> bool:
    """Triton runs its kernels on the CPU, slowly, to check them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_error() -> str | None:
    """Why the Triton kernels cannot be imported or built; None where they can, as far as is known."""
    if _broken:
        return _broken
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton does not import ({error}): pip install 'sae-kernels[triton]'"
    return None


def cuda_error(device: torch.device | None = None) -> str | None:
    """Why the CUDA C++ kernels cannot run, there or at all; None where they can."""
    if _native.cuda_error:
        return f"the CUDA library is {_native.cuda_error}"
    if device is not None and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return (
                f"the CUDA kernels need compute capability 8.0 or later, {device} has {'.'.join(map(str, capability))}"
            )
    return None


def _cuda_devices() -> bool:
    return _native.cuda_runs_on == "cpu" or torch.cuda.is_available()


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


def pick(device: torch.device, on_cuda: str = "triton") -> str:
    """The backend for tensors on `device`: the forced one, else the best of that device, else the reference.

    on_cuda: which of "triton" and "cuda" is the faster for the op; the other serves where it is missing or has failed.
    """
    global _warned
    if _forced == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' is forced and the tensors are on {device}")
    if _forced == "triton" and device.type != ("cpu" if interpreted() else "cuda"):
        raise ValueError(f"backend 'triton' is forced and the tensors are on {device}")
    if _forced == "cuda" and device.type != _native.cuda_runs_on:
        raise ValueError(f"backend 'cuda' is forced and the tensors are on {device}")
    if _forced != "auto":
        return _forced
    if device.type == "cpu" and _native.cpu_loaded():
        return "cpu"
    if device.type == "cuda":
        works = [name for name, error in (("triton", triton_error()), ("cuda", cuda_error(device))) if error is None]
        if works:
            return on_cuda if on_cuda in works else works[0]
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        causes = {"cpu": _native.cpu_error, "cuda": f"{triton_error()}; {cuda_error(device)}"}
        cause = causes.get(device.type, f"this version has no kernels for {device.type}")
        warnings.warn(f"sae_kernels runs its plain torch reference, which is slow: {cause}", stacklevel=3)
    return "reference"


def triton_or(kernel: Callable, plain: Callable) -> Callable:
    """`kernel` on its first argument's device; `plain`, after one warning, once Triton has failed to build one.

    Where "triton" is forced the failure is raised.
    """

    def run(tensor: Tensor, *args):
        global _broken
        if _broken and _forced != "triton":
            return plain(tensor, *args)
        try:
            with _on(tensor):
                return kernel(tensor, *args)
        except Exception as error:
            if _forced == "triton" or not _is_build_failure(error):
                raise
            _broken = f"Triton cannot build {kernel.__name__.strip('_')}: {type(error).__name__}: {error}"
            slower = "plain torch reference, which is slow" if _without_cuda(tensor) else "CUDA C++ kernels"
            warnings.warn(f"sae_kernels runs its {slower}: {_broken}", stacklevel=2)
            return plain(tensor, *args)

    return run


def cuda_or(kernel: Callable, plain: Callable) -> Callable:
    """`kernel`, of CUDA C++, on its first argument's device; `plain` where the CUDA library is not there."""

    def run(tensor: Tensor, *args):
        if _without_cuda(tensor):
            return plain(tensor, *args)
        with _on(tensor):
            return kernel(tensor, *args)

    return run


def _without_cuda(tensor: Tensor) -> bool:
    return tensor.device.type != _native.cuda_runs_on or cuda_error(tensor.device) is not None


def _on(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _is_build_failure(error: Exception) -> bool:
    """Of Triton's own, or of the C compiler that it calls for the launcher."""
    of_triton = type(error).__module__.startswith("triton.")
    return of_triton or isinstance(error, subprocess.CalledProcessError) or "C compiler" in str(error)
