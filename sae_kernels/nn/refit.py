"""A code whose values are fitted to the input, in order of strength again."""

from collections.abc import Callable

from torch import Tensor


def refitted(
    x: Tensor, values: Tensor, indices: Tensor, fit: Callable[[Tensor, Tensor, Tensor], Tensor], activation: str
) -> tuple[Tensor, Tensor]:
    """values and indices [..., k], strongest first, with the values fit(x [N, d], values [N, k], indices [N, k]); under
    "relu" those that would be negative are 0. Gradients are the old values'.
    """
    shape, k = values.shape, values.shape[-1]
    old, at = values.detach().reshape(-1, k), indices.reshape(-1, k)
    new = fit(x.detach().reshape(-1, x.shape[-1]), old, at)
    if activation == "relu":
        new = new.clamp(min=0)
    order = (new.abs() if activation == "abs" else new).argsort(dim=-1, descending=True, stable=True)
    if values.requires_grad:
        new = new + (values.reshape(-1, k) - old)
    return new.gather(-1, order).reshape(shape), at.gather(-1, order).reshape(shape)
