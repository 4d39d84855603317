"""What the ops do under torch.autocast: tensors of several floating dtypes are brought to the weights'."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

# asked once: not every torch can trace the question in a compiled graph
_DEVICES = tuple(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))


def widened(weight: object, *tensors: Tensor | None) -> tuple:
    """The tensors in the weight's dtype where autocast is on for its device; else as they came."""
    known = isinstance(weight, Tensor) and weight.device.type in _DEVICES
    if not known or not torch.is_autocast_enabled(weight.device.type):
        return tensors
    return tuple(t.to(weight.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors)


def switched_off(device: torch.device) -> AbstractContextManager:
    """Around a reference: autocast would make it select on rounded pre-activations."""
    if device.type in _DEVICES:
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def unaffected(reference: Callable) -> Callable:
    """The function, whose first argument is a tensor, with autocast switched off for its device."""

    @wraps(reference)
    def run(first: Tensor, *args: Any) -> Any:
        with switched_off(first.device):
            return reference(first, *args)

    return run
