"""ActivationStats around the kernels of csrc/cuda/activation_stats.cuh; nothing here waits for the device."""

import torch
from torch import Tensor

_lib = torch.library.Library("sae_kernels", "FRAGMENT")
_lib.define(
    "cuda_stats_update(Tensor values, Tensor indices, Tensor(a!) counts, Tensor(b!) sums, Tensor(c!) maximum,"
    " Tensor(d!) last, Tensor(e!) rejected, Tensor(f!) foreign, int row, Tensor? numbers) -> ()"
)
_lib.define("cuda_stats_histogram(Tensor values, Tensor indices, Tensor(a!) table, int low, int bits) -> ()")
_lib.define("cuda_stats_cooccurrence(Tensor values, Tensor indices, Tensor? position, Tensor(a!) table) -> ()")
_lib.define("cuda_stats_mark(Tensor values, Tensor indices, Tensor top_values, Tensor(a!) keys) -> ()")
_lib.define(
    "cuda_stats_merge(Tensor values, Tensor indices, Tensor ids, Tensor order, Tensor starts, Tensor(a!) top_values,"
    " Tensor(b!) top_ids) -> ()"
)
_lib.define("cuda_stats_fired(Tensor values, Tensor indices, Tensor? counted, Tensor(a!) marks) -> ()")
_ops = torch.ops.sae_kernels


def update(
    values: Tensor, indices: Tensor, counts: Tensor, sums: Tensor, maximum: Tensor, last: Tensor, rejected: Tensor,
    foreign: Tensor, row: int, numbers: Tensor | None,
) -> None:  # fmt: skip
    """The state as in ops/reference_stats.py; foreign [1] int64 counts entries without a latent. numbers [N] int64,
    ascending: of the rows, or None where they count up from `row`.
    """
    if values.numel() > 0:
        _ops.cuda_stats_update(values, indices, counts, sums, maximum, last, rejected, foreign, row, numbers)


def histogram(values: Tensor, indices: Tensor, table: Tensor, low: int, bits: int) -> None:
    """table [d_sae, bins + 2] int64."""
    if values.numel() > 0:
        _ops.cuda_stats_histogram(values, indices, table, low, bits)


def top(values: Tensor, indices: Tensor, ids: Tensor, top_values: Tensor, top_ids: Tensor) -> None:
    """ids [N] int64; top_values [d_sae, n] float64, top_ids [d_sae, n] int64.

    The entries that reach their latent's last kept value are sorted by latent, and a warp merges those of one. All
    memory is asked for before anything is changed.
    """
    if values.numel() == 0:
        return
    keys = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    _ops.cuda_stats_mark(values, indices, top_values, keys)
    ranked, order = keys.flatten().sort(stable=True)
    latents = torch.arange(top_values.shape[0] + 1, dtype=torch.int32, device=values.device)
    starts = torch.searchsorted(ranked, latents)
    _ops.cuda_stats_merge(values, indices, ids, order, starts, top_values, top_ids)


def cooccurrence(values: Tensor, indices: Tensor, position: Tensor | None, table: Tensor) -> None:
    """position [d_sae] int64: place in the table or -1, None: the latent itself; table [m, m] int64."""
    if values.numel() > 0:
        _ops.cuda_stats_cooccurrence(values, indices, position, table)


def fired(values: Tensor, indices: Tensor, weight: Tensor | None, d_sae: int) -> Tensor:
    """values, indices [N, k], weight [N] -> [d_sae] bool: latents of values other than 0, in rows of weight above 0."""
    marks = torch.zeros(d_sae, dtype=torch.bool, device=values.device)
    if values.numel() > 0 and d_sae > 0:
        counted = None if weight is None else (weight > 0).contiguous()
        _ops.cuda_stats_fired(values.contiguous(), indices.contiguous(), counted, marks)
    return marks
