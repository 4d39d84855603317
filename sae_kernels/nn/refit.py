"""Values of a code whose latents are chosen, fitted to the input itself."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.reference import accumulator

Products = Callable[[Tensor, Tensor], Tensor]


def refitted(
    x: Tensor, values: Tensor, indices: Tensor, decode: Products, products: Products, steps: int, activation: str
) -> tuple[Tensor, Tensor]:
    """values and indices [..., k], strongest first, after `steps` of conjugate gradients towards the least-squares fit
    of x [..., d] on the latents given. Under "relu" a value that would be negative is 0. Gradients are the old values'.

    decode(values [N, k], indices) -> sum_j values_j W_dec[indices_j] [N, d]; products(y [N, d], indices) -> y .
    W_dec[indices_j] [N, k]; both take and return the dtype of values.
    """
    shape, k = values.shape, values.shape[-1]
    old, at = values.detach().reshape(-1, k), indices.reshape(-1, k)
    fit = _conjugate_gradients(x.detach().reshape(-1, x.shape[-1]), old, at, decode, products, steps)
    if activation == "relu":
        fit = fit.clamp(min=0)
    order = (fit.abs() if activation == "abs" else fit).argsort(dim=-1, descending=True, stable=True)
    if values.requires_grad:
        fit = fit + (values.reshape(-1, k) - old)
    return fit.gather(-1, order).reshape(shape), at.gather(-1, order).reshape(shape)


@torch.no_grad()
def _conjugate_gradients(x: Tensor, values: Tensor, indices: Tensor, decode, products, steps: int) -> Tensor:
    """On the normal equations (Hestenes & Stiefel 1952), from `values` on, for each row by itself: until a step would
    take less than rounding from its squared error. A slot of value 0 stays so. Sums and steps are in float32, or
    float64 for float64.
    """
    dtype, acc = values.dtype, accumulator(values.dtype)
    fit, free = values.to(acc), values != 0
    error = x.to(acc) - decode(values, indices)
    direction = size = going = None
    for _ in range(steps):
        gradient = products(error.to(dtype), indices).to(acc) * free
        last, size = size, _square(gradient)
        direction = gradient if last is None else gradient + _over(size, last) * direction
        moved = decode(direction.to(dtype), indices).to(acc)
        length = _over(size, _square(moved))
        worth = ~(length * size <= torch.finfo(acc).eps * _square(error))  # NaN goes on
        going = worth if going is None else going & worth
        length = torch.where(going, length, 0)
        fit, error = fit + length * direction, error - length * moved
    return fit.to(dtype)


def _square(rows: Tensor) -> Tensor:
    return rows.square().sum(-1, keepdim=True)


def _over(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0: nothing is left to descend."""
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))
