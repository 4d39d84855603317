"""refit_values: the values with which the chosen latents come closest to the input."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import _autocast
from ._backend import pick
from .reference import accumulator
from .sparse_decode import code_products, naming_bad_indices, sparse_decode

_lib = torch.library.Library("sae_kernels", "FRAGMENT")
_lib.define("refit_values(Tensor x, Tensor values, Tensor indices, Tensor W_dec, int steps) -> Tensor")
_kernel = torch.ops.sae_kernels.refit_values.default


@torch.library.register_fake("sae_kernels::refit_values", lib=_lib)
def _fake(x, values, indices, W_dec, steps):
    return torch.empty_like(values, memory_format=torch.contiguous_format)


@torch.no_grad()
def refit_values(x: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, steps: int) -> Tensor:
    """values [N, k] after `steps` of conjugate_gradients towards x [N, d] on the rows `indices` of W_dec [d_sae, d].

    x, values and W_dec of one dtype. Raises ValueError for an index out of range. No gradient.
    """
    with _autocast.switched_off(x.device):
        if pick(x.device) == "cpu":
            arguments = (x, values, indices, W_dec, steps)
            return naming_bad_indices("refit_values", _kernel, indices, W_dec.shape[0], *arguments)
        decode, products = partial(sparse_decode, W_dec=W_dec), partial(code_products, W_dec=W_dec)
        return conjugate_gradients(x, values, indices, decode, products, steps)


@torch.no_grad()
def conjugate_gradients(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    decode: Callable[[Tensor, Tensor], Tensor],
    products: Callable[[Tensor, Tensor], Tensor],
    steps: int,
) -> Tensor:
    """Least squares by conjugate gradients on the normal equations (Hestenes & Stiefel 1952), from values [N, k] on,
    for each row by itself: `steps` of them, or until one would take less than rounding from the row's squared error.

    decode(values [N, k], indices) -> sum_j values_j W_dec[indices_j] [N, d]; products(y [N, d], indices) -> y .
    W_dec[indices_j] [N, k]; both take and return the dtype of values. A slot of value 0 stays so. Sums and steps are in
    float32, or float64 for float64.
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
