"""sparse_decode and the sums per latent around the kernels of csrc/cuda/sparse_decode.cuh and latent_sums.cuh."""

import torch
from torch import Tensor

from ..kernels import tuning

_lib = torch.library.Library("sae_kernels", "FRAGMENT")
_lib.define("cuda_decode(Tensor values, Tensor indices, Tensor W, Tensor? bias, Tensor(a!) out) -> ()")
_lib.define("cuda_decode_dots(Tensor grad, Tensor indices, Tensor W, Tensor(a!) out) -> ()")
_lib.define(
    "cuda_latent_sums(Tensor rows, Tensor weights, Tensor? W, Tensor latents, Tensor order, Tensor(a!)? dots,"
    " Tensor(b!) sums, Tensor(c!)? totals, Tensor(d!) slots, Tensor(e!) slot_totals, int chunk) -> ()"
)
_ops = torch.ops.sae_kernels


def sparse_decode(values: Tensor, indices: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """values, indices [N, k], W [d_sae, d_out], b [d_out] -> [N, d_out] in W's dtype.

    A row with an index out of range becomes NaN.
    """
    out = W.new_empty(values.shape[0], W.shape[1])
    if out.numel() > 0:
        bias = None if b is None else b.contiguous()
        _ops.cuda_decode(values.contiguous(), indices.contiguous(), W.contiguous(), bias, out)
    return out


def grad_values(grad: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """grad [N, d_out], indices [N, k], W [d_sae, d_out] -> [N, k] in grad's dtype; NaN where out of range."""
    out = grad.new_empty(indices.shape)
    if out.numel() > 0:
        _ops.cuda_decode_dots(grad.contiguous(), indices.contiguous(), W.contiguous(), out)
    return out


def backward(grad: Tensor, values: Tensor, indices: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of values [N, k] and of W [d_sae, d_out], from one read of `grad` where its rows are short."""
    if W.shape[1] <= _widest_row(W):
        sums, _, dots = latent_sums(indices, values, grad, W.shape[0], W=W)
        return dots, sums
    return grad_values(grad, indices, W), latent_sums(indices, values, grad, W.shape[0])[0]


def latent_sums(
    indices: Tensor, weights: Tensor, rows: Tensor, d_sae: int, *,
    with_totals: bool = False, W: Tensor | None = None, chunk: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """indices, weights [N, k], rows [N, d] -> sums [d_sae, d]; sums of the weights [d_sae]; dots [N, k] with W [d_sae,
    d].

    The last two where asked for, W with d up to one slice. Entries whose index is out of range are left out of the
    sums, and their dots are NaN. One fixed order of summation. chunk: entries of one team; None lets the workspace
    decide.
    """
    entries, d = indices.numel(), rows.shape[1]
    sums = rows.new_zeros(d_sae, d)
    totals = rows.new_zeros(d_sae) if with_totals else None
    dots = None if W is None else rows.new_zeros(indices.shape)
    if entries * d == 0:
        return sums, totals, dots
    chunk = chunk or tuning.chunk_length(entries, d, rows.element_size())
    latents, order = indices.reshape(-1).sort(stable=True)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    slots = rows.new_empty(2 * -(-entries // chunk), d, dtype=wide)
    slot_totals = rows.new_empty(slots.shape[0], dtype=wide)
    _ops.cuda_latent_sums(
        _aligned(rows), weights.contiguous(), None if W is None else _aligned(W), latents, order, dots, sums, totals,
        slots, slot_totals, chunk,
    )  # fmt: skip
    return sums, totals, dots


def _aligned(t: Tensor) -> Tensor:
    """Contiguous, and at an address where 16 bytes can be read at once."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % 16 else t


def _widest_row(W: Tensor) -> int:
    """Columns of one slice: 32 lanes of 16 bytes, or of one element where rows begin at other addresses."""
    size = W.element_size()
    return 512 // size if W.shape[1] * size % 16 == 0 else 32
