"""The kernels of ActivationStats on a GPU, in Triton and in CUDA C++, with what stands in for each that cannot run."""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from . import reference_stats
from ._backend import cuda_or, pick, triton_or

MOST_IN_TABLES = 2**15  # latents; each piece of the tables in shared memory reads all indices anew


def _known(values: Tensor, indices: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """values and indices, 0 where an index is out of range, and where it is not."""
    known = (indices >= 0) & (indices < d_sae)
    return torch.where(known, values, 0), torch.where(known, indices, 0), known


def _plain_update(values, indices, counts, sums, maximum, last, rejected, foreign, row, numbers) -> None:
    values, indices, known = _known(values, indices, counts.shape[0])
    foreign += (~known).sum()
    reference_stats.update(values, indices, counts, sums, maximum, last, rejected, row, numbers)


def _plain_histogram(values, indices, table, low, bits) -> None:
    reference_stats.histogram(*_known(values, indices, table.shape[0])[:2], table, low, bits)


def _plain_top(values, indices, ids, top_values, top_ids) -> None:
    reference_stats.top(*_known(values, indices, top_values.shape[0])[:2], ids, top_values, top_ids)


def _plain_cooccurrence(values, indices, position, table) -> None:
    d_sae = table.shape[0] if position is None else position.shape[0]
    reference_stats.cooccurrence(*_known(values, indices, d_sae)[:2], position, table)


def _kernel(package: str, name: str) -> Callable[..., None]:
    def run(values: Tensor, *args) -> None:
        getattr(import_module(f"..{package}.activation_stats", __package__), name)(values, *args)

    run.__name__ = f"activation_stats_{name}"
    return run


def _triton_top(values: Tensor, indices: Tensor, ids: Tensor, top_values: Tensor, top_ids: Tensor) -> None:
    from ..kernels import activation_stats

    kept = top_values.shape[1]
    run = activation_stats.top if kept <= activation_stats.LARGEST_TOP else _plain_top
    run(values, indices, ids, top_values, top_ids)


_plain = {"update": _plain_update, "histogram": _plain_histogram, "top": _plain_top}
_plain["cooccurrence"] = _plain_cooccurrence
_cuda = {name: cuda_or(_kernel("cuda", name), plain) for name, plain in _plain.items()}
_triton = {name: _triton_top if name == "top" else _kernel("kernels", name) for name in _plain}
# backend -> kernel -> function
KERNELS = {"cuda": _cuda, "triton": {name: triton_or(_triton[name], _cuda[name]) for name in _plain}}


def kernels(device: torch.device, d_sae: int) -> dict[str, Callable[..., None]] | None:
    """Those of the backend for tensors on `device`; None where it has none of its own for a GPU.

    Triton adds to the state by atomics in global memory, and the CUDA C++ kernel to tables in shared memory, which an
    H200 does four times as fast for 4096 latents: unless Triton is forced it stands in where it is built.
    """
    backend = pick(device)
    if backend == "triton" and update_backend(device, d_sae) == "cuda":
        return {**KERNELS["triton"], "update": KERNELS["cuda"]["update"]}
    return KERNELS.get(backend)


def update_backend(device: torch.device, d_sae: int) -> str:
    """Whose `update` serves tensors on `device`."""
    return pick(device, on_cuda="cuda" if d_sae <= MOST_IN_TABLES else "triton")
