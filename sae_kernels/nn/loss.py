"""The reconstruction loss and AuxK, without row-sized temporaries and without a host sync."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..ops import _checks, sae_loss, sparse_decode, topk_encode
from ..ops._rows import row_blocks
from ..ops.reference import accumulator
from .code import SparseCode
from .group import summed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_RESIDUAL_ELEMENTS = 2**20  # 4 MiB of float32


class SAELoss(NamedTuple):
    """What an SAE's `loss` gives: scalars in float32, or float64 for float64.

    loss: fvu + aux_coef * aux, and what a subclass adds (JumpReLUSAE: its penalty on l0); fvu: the fraction of variance
    unexplained; aux: the same of what AuxK rebuilds of the rows; l0: the latents that fire per row; code: that of x.
    """

    loss: Tensor
    fvu: Tensor
    aux: Tensor
    l0: Tensor
    code: SparseCode


def _weighted_square(difference: Tensor, weight: Tensor | None) -> Tensor:
    # row by row first: the order of summation is then the same for any number of threads
    return weighted_sum(torch.linalg.vector_norm(difference, dim=-1).square(), weight)


class _SquaredError(torch.autograd.Function):
    """sum of weight * (y - x)^2; keeps y and x, which live anyway, and nothing else of their size."""

    @staticmethod
    def forward(y, x, weight):
        acc = accumulator(y.dtype)
        total = torch.zeros((), dtype=acc, device=y.device)
        for block in row_blocks(y):
            difference = y[block].to(acc) - x[block]
            total = total + _weighted_square(difference, None if weight is None else weight[block])
        return total

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, x, weight = ctx.saved_tensors
        factor = 2 * grad if weight is None else (2 * grad * weight).unsqueeze(-1)
        dy = (y - x).mul_(factor)
        return dy if ctx.needs_input_grad[0] else None, -dy if ctx.needs_input_grad[1] else None, None


def squared_error(y: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """sum_n weight[n] * |y[n] - x[n]|^2 of y, x [N, d], in float32 or wider; weight [N] or None for 1."""
    return _SquaredError.apply(y, x, weight)


def reconstruction_error(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor
) -> Tensor:
    """sum_n weight[n] * |x_hat[n] - x[n]|^2 / scale of what the code decodes to, with scale a constant; weight [N] or
    None for 1.

    A large batch in float32 or float64 goes block by block, and no residual is kept: the gradients, which are smaller,
    are formed at once.
    """
    if keeps_residual(x, W_dec) or x.requires_grad:
        return weighted_sum(sae_loss(x, values, indices, W_dec, b_dec).errors, weight) / scale
    return _BlockwiseError.apply(values, indices, W_dec, b_dec, x, weight, scale, torch.is_grad_enabled())


def keeps_residual(x: Tensor, W_dec: Tensor) -> bool:
    """Whether the residual of x [N, d] is small enough to be kept until backward."""
    wide = x.dtype in (torch.float32, torch.float64)
    return not wide or x.numel() <= _block_elements(W_dec) or torch.compiler.is_compiling()


def checked_weight(op: str, weight: Tensor, x: Tensor) -> Tensor:
    """weight [...] of rows x [..., d_in] as a constant in the dtype of sums; raises TypeError or ValueError."""
    _checks.tensor(op, "weight", weight)
    if weight.shape != x.shape[:-1]:
        shapes = f"weight {tuple(weight.shape)} must have the leading shape of x {tuple(x.shape)}"
        raise ValueError(f"{op}: {shapes}")
    if weight.dtype != torch.bool and not weight.is_floating_point():
        raise TypeError(f"{op}: weight must be bool or floating, got {weight.dtype}")
    _checks.same_device(op, "x", x, "weight", weight)
    return weight.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def weighted_sum(rows: Tensor, weight: Tensor | None) -> Tensor:
    """sum_n weight[n] * rows[n]; weight [N] or None for 1."""
    return (rows if weight is None else rows * weight).sum()


def _block_elements(W_dec: Tensor) -> int:
    # every block adds a gradient of the size of W_dec: a block much smaller than that would pay more than it saves
    return max(_RESIDUAL_ELEMENTS, W_dec.numel() // 4)


def _block_error(values, indices, W_dec, b_dec, x, weight, scale, places: list[Tensor | None]) -> Tensor:
    """The error of some rows; adds its gradients to `places` (values, W_dec, b_dec) where they are wanted."""
    wanted = [place is not None for place in places]
    with torch.set_grad_enabled(any(wanted)):
        leaves = [t.detach().requires_grad_(w) for t, w in zip((values, W_dec, b_dec), wanted, strict=True)]
        error = weighted_sum(sae_loss(x, leaves[0], indices, *leaves[1:]).errors, weight) / scale
    if any(wanted):
        found = torch.autograd.grad(error, [leaf for leaf in leaves if leaf.requires_grad])
        for place, grad in zip((p for p in places if p is not None), found, strict=True):
            place.add_(grad)
    return error.detach()


class _BlockwiseError(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, W_dec, b_dec, x, weight, scale, with_grad):
        needed = [with_grad and need for need in (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4])]
        grads = [torch.zeros_like(t) if n else None for t, n in zip((values, W_dec, b_dec), needed, strict=True)]
        total = torch.zeros_like(scale)
        for rows in row_blocks(x, _block_elements(W_dec)):
            places = [grads[0][rows] if needed[0] else None, grads[1], grads[2]]
            part = None if weight is None else weight[rows]
            block = (values[rows], indices[rows], W_dec, b_dec, x[rows], part, scale)
            total = total + _block_error(*block, places)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        one = grad.device.type == "cpu" and grad.item() == 1  # as it mostly is: no copies then, and no sync
        dvalues, dW, db = (part if part is None or one else part * grad for part in ctx.saved_tensors)
        return dvalues, None, dW, db, None, None, None, None


@torch.no_grad()
def total_variance(x: Tensor, weight: Tensor | None = None, group: ProcessGroup | None = None) -> Tensor:
    """sum_n weight[n] * |x[n] - mean|^2 of x [N, d], over the rows of all processes of `group`.

    Where that is 0 but for rounding (one row, equal rows) the sum of squares about zero, and 1 where that is 0 as well:
    the result can always be divided by.
    """
    acc = accumulator(x.dtype)
    zero = torch.zeros((), dtype=acc, device=x.device)
    mass = zero + x.shape[0] if weight is None else weight.sum()
    total = torch.zeros(x.shape[1], dtype=acc, device=x.device)
    for block in row_blocks(x):
        part = x[block] if weight is None else x[block] * weight[block].unsqueeze(-1)
        total = total + part.sum(0, dtype=acc)
    if group is not None:
        total, mass = summed(torch.cat([total, mass.to(acc).reshape(1)]), group).split([x.shape[1], 1])
        mass = mass.squeeze(0)
    mean = total / torch.where(mass > 0, mass, 1)
    variance = zero
    for block in row_blocks(x):
        variance = variance + _weighted_square(x[block] - mean, None if weight is None else weight[block])
    variance = summed(variance, group)
    about_zero = variance + mass * mean.square().sum()
    variance = torch.where(variance > (16 * torch.finfo(acc).eps) ** 2 * about_zero, variance, about_zero)
    return torch.where(variance > 0, variance, 1)


def auxk_loss(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    candidates: Tensor,
    dead: Tensor,
    k: int,
    activation: str,
    weight: Tensor | None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """How much of x the dead latents leave when they reconstruct it alone: |x - x_hat|^2 / |x|^2.

    AuxK of Gao et al. 2024, but for its target: there the dead latents explain what the others leave. Fitted to a
    residual they fire as weakly as it is, win no place among the k strongest and stay dead; fitted to x they compete.

    x [N, d_in], a constant; candidates [m] latents, dead [m] bool says which of them count; k <= m. Gradient goes to
    the dead candidates' rows of W_enc, b_enc and W_dec alone; exactly 0, with gradient 0, where none is dead. With a
    group, |x|^2 is that of the rows of all its processes: the results add up to the whole's.
    """
    x = x.detach()
    values, indices = topk_encode(x, W_enc[candidates], b_enc[candidates], k, activation=activation, latent_mask=dead)
    left = squared_error(sparse_decode(values, indices, W_dec[candidates]), x, weight)
    energy = summed(squared_error(torch.zeros_like(x), x, weight), group)
    return torch.where(dead.any(), left / torch.where(energy > 0, energy, 1), 0)
