"""Unit-norm decoder rows: the gradient projected before an optimiser's step, the rows renormalised after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .sae import TopKSAE


@torch.no_grad()
def normalize_rows_(W: Tensor) -> None:
    """Divides the rows of W [n, d] by their norm, in place; rows of zeros stay."""
    norm = torch.linalg.vector_norm(W, dim=-1, keepdim=True, dtype=torch.promote_types(W.dtype, torch.float32))
    W.div_(torch.where(norm > 0, norm, 1))


@torch.no_grad()
def project_rows_(grad: Tensor, W: Tensor) -> None:
    """Takes out of the rows of grad [n, d] what lies along the rows of W [n, d], in place."""
    square = torch.einsum("nd,nd->n", W, W)
    along = torch.einsum("nd,nd->n", grad, W) / torch.where(square > 0, square, 1)
    grad.addcmul_(W, along.unsqueeze(-1), value=-1)


class ConstraintHandle:
    """The two hooks on one optimiser; remove() takes them off, and so does leaving a `with` block."""

    def __init__(self, sae: TopKSAE, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"constrain: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not any(p is sae.W_dec for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("constrain: W_dec is not among the parameters of the optimizer")
        self._sae = sae
        self._handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._sae.project_grad_()
            return None

        def projected() -> Any:  # with a closure the gradient comes into being inside the step
            result = closure()
            self._sae.project_grad_()
            return result

        if len(args) > 1:
            return (args[0], projected, *args[2:]), kwargs
        return args, {**kwargs, "closure": projected}

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._sae.W_dec.requires_grad:  # a frozen decoder stays as it is
            self._sae.normalize_decoder_()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> ConstraintHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()
