"""The rows of a module's output, and which positions of them count."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Mask = Callable[..., Tensor] | Tensor


def unnested(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A nested tensor [B, *, d], as nn.TransformerEncoder makes in eval mode, as [B, T, d] with its mask [B, T]."""
    if not x.is_nested:
        return x, mask
    lengths = torch.tensor([row.shape[0] for row in x.unbind()], device=x.device)
    padded = torch.nested.to_padded_tensor(x, 0.0)
    real = torch.arange(padded.shape[1], device=x.device) < lengths.unsqueeze(1)
    if mask is not None and mask.dim() == 2 and mask.shape[0] == real.shape[0]:
        real = real & mask[:, : real.shape[1]]
    return padded, real


def nested_like(x: Tensor, original: Tensor) -> Tensor:
    """x [B, T, d] cut to the lengths of `original` where that is nested."""
    if not original.is_nested:
        return x
    rows = [row[: part.shape[0]] for row, part in zip(x, original.unbind(), strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=original.layout)


def check_positions(positions: str) -> None:
    if positions not in ("all", "last"):
        raise ValueError(f"positions must be 'all' or 'last', got {positions!r}")


def check_rows(x: Tensor, where: str, positions: str, mask: Tensor | None) -> None:
    """x [..., d], mask x.shape[:-1] bool; positions "last" needs [B, T, d]."""
    if not x.is_floating_point() or x.dim() < 1:
        raise TypeError(f"{where}: the output must be a floating tensor [..., d], got {x.dtype} {tuple(x.shape)}")
    if positions == "last" and x.dim() < 3:
        raise ValueError(f"{where}: positions='last' needs an output [B, T, d], got {tuple(x.shape)}")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(
            f"{where}: mask {tuple(mask.shape)} must be {tuple(x.shape[:-1])}, for the output is {tuple(x.shape)}"
        )


def last_position(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """For x [..., T, d]: the last position that the mask keeps [...] int64, and whether there is one [...] bool."""
    shape, length = x.shape[:-2], x.shape[-2]
    if mask is None or length == 0:
        last = torch.full(shape, max(length - 1, 0), device=x.device)
        return last, torch.full(shape, length > 0, device=x.device)
    last = (torch.arange(length, device=x.device) * mask).amax(-1)
    return last, mask.any(-1)


def in_backward() -> bool:
    """Whether a backward pass is under way on this thread: modules that run now are run again, by checkpointing."""
    return torch._C._current_graph_task_id() != -1


class MaskSource:
    """The mask of the forward pass that is under way: a tensor, or what a callable makes of the model's own inputs."""

    def __init__(self, model: nn.Module, mask: Mask | None, where: str) -> None:
        if mask is not None and not callable(mask) and not isinstance(mask, Tensor):
            raise TypeError(f"{where}: mask must be a tensor, a callable or None, got {type(mask).__name__}")
        self.mask, self._where, self._running, self._computed = mask, where, False, None
        self._last = None  # that of the pass before, which activation checkpointing may run again in backward
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if _is_function(self.mask):
            self._computed, self._running = self.mask(*args, **kwargs), True

    def _after(self, model: nn.Module, args: tuple, output: Any) -> None:
        self._last, self._computed, self._running = self._computed, None, False

    def current(self, device: torch.device) -> Tensor | None:
        """The mask in force as bool on `device`, True where a position is real; None for no mask."""
        mask = self.mask
        if _is_function(mask):
            again = not self._running and self._last is not None and in_backward()
            if not self._running and not again:
                raise RuntimeError(f"{self._where}: mask takes the inputs of the model, and the model was not called")
            mask = self._last if again else self._computed
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise TypeError(f"{self._where}: mask must be a tensor, got {type(mask).__name__}")
        return mask.to(device=device, dtype=torch.bool)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _is_function(mask: Mask | None) -> bool:
    return callable(mask) and not isinstance(mask, Tensor)
