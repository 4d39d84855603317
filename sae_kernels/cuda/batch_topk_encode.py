"""The last step of batch_topk_encode around the kernels of csrc/cuda/batch_keep.cuh."""

import torch
from torch import Tensor

_DIGITS = 2**11  # kDigits in batch_keep.cuh

_lib = torch.library.Library("sae_kernels", "FRAGMENT")
_lib.define(
    "cuda_batch_keep_split(Tensor values, Tensor counts, Tensor(a!) digits, Tensor(b!) state, Tensor(c!) above,"
    " Tensor(d!) equal, bool magnitude) -> ()"
)
_lib.define(
    "cuda_batch_keep_write(Tensor values, Tensor counts, Tensor state, Tensor above, Tensor equal, Tensor before,"
    " Tensor(a!) kept, Tensor(b!) kept_counts, Tensor(c!) threshold, bool magnitude) -> ()"
)
_ops = torch.ops.sae_kernels


def batch_keep(values: Tensor, counts: Tensor, total: int, magnitude: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As ops/reference.py's, of values in float32. Workspace: 16 bytes per row and 16 KiB."""
    values, counts = values.contiguous(), counts.contiguous()
    kept, kept_counts = torch.empty_like(values), torch.empty_like(counts)
    threshold = values.new_zeros(())
    if values.numel() == 0:
        return kept, kept_counts.zero_(), threshold
    digits, state = counts.new_zeros(_DIGITS, dtype=torch.int64), counts.new_zeros(2, dtype=torch.int64)
    state[1] = total
    above, equal = torch.empty_like(counts), torch.empty_like(counts)
    _ops.cuda_batch_keep_split(values, counts, digits, state, above, equal, magnitude)
    before = equal.cumsum(0, dtype=torch.int64)
    _ops.cuda_batch_keep_write(values, counts, state, above, equal, before, kept, kept_counts, threshold, magnitude)
    return kept, kept_counts, threshold
