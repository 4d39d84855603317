"""What runs here: versions, devices, native libraries and why one is absent."""

import platform
from importlib import metadata
from typing import Any

import torch

from . import _native

# the GPU on which each op's results have been checked against its oracle and timed; None: not yet on any
GPU_VERIFIED: dict[str, str | None] = {
    op: "NVIDIA H200"
    for op in (
        "topk_encode",
        "threshold_encode",
        "batch_topk_encode",
        "sparse_decode",
        "sae_loss",
        "ActivationStats",
    )
}
# which have other kernels since they were timed, in part or in whole
GPU_CHANGED = frozenset({"topk_encode", "threshold_encode", "batch_topk_encode"})


def info() -> dict[str, Any]:
    """Versions, devices, threads, the native libraries, the CPU's instruction set, the backend ops take on the CPU.

    `gpu_verified` names, per op, the GPU on which it has been checked and timed, and says where its kernels changed
    after it was timed or where there is none yet.
    """
    from . import __version__
    from .ops import _backend

    loaded = _native.cpu_loaded()
    forced = _backend._forced
    return {
        "sae_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "triton": _version("triton"),
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": ["cpu", *(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))],
        "threads": torch.get_num_threads(),
        "native_cpu": "loaded" if loaded else _native.cpu_error,
        "native_cuda": _native.cuda_error or "loaded",
        "instruction_set": _native.cpu_isa(),
        "backend": forced if forced != "auto" else ("cpu" if loaded else "reference"),
        "backend_forced": forced != "auto",
        "gpu_verified": {op: _verified(op) for op in GPU_VERIFIED},
    }


def _verified(op: str) -> str:
    newer = " (timed before its kernels changed)" if op in GPU_CHANGED else ""
    return f"{GPU_VERIFIED[op]}{newer}" if GPU_VERIFIED[op] else "not yet verified on a GPU"


def format_info(facts: dict[str, Any]) -> str:
    """`info()` as lines to read."""
    backend = f"{facts['backend']} ({'forced' if facts['backend_forced'] else 'chosen by the device'})"
    rows = [
        ("sae_kernels", facts["sae_kernels"]),
        ("torch", facts["torch"]),
        ("python", f"{facts['python']} on {facts['platform']}"),
        ("triton", facts["triton"] or "not installed"),
        ("devices", ", ".join(facts["devices"])),
        ("threads", facts["threads"]),
        ("native CPU library", facts["native_cpu"]),
        ("native CUDA library", facts["native_cuda"]),
        ("instruction set", facts["instruction_set"] or "none: plain torch runs instead"),
        ("backend on CPU", backend),
        *((f"{op} on a GPU", state) for op, state in facts["gpu_verified"].items()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
