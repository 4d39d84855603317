"""Checks of the ops' arguments: one clear error that names the argument, what came and what was expected."""

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tensor(op: str, name: str, value: object, dims: int | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if dims is not None and value.dim() != dims:
        plural = "s" if dims > 1 else ""
        raise ValueError(f"{op}: {name} must have {dims} dimension{plural}, got shape {tuple(value.shape)}")


def floating(op: str, **tensors: Tensor | None) -> None:
    """All of them one supported floating dtype on one device."""
    first_name = first = None
    for name, t in tensors.items():
        if t is None:
            continue
        if first is None:
            first_name, first = name, t
            if t.dtype not in FLOATS:
                raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {t.dtype}")
            dtype, device = t.dtype, t.device
            continue
        if t.dtype != dtype:
            raise TypeError(f"{op}: {name} is {t.dtype} and {first_name} is {dtype}; they must have one dtype")
        if t.device != device:
            same_device(op, first_name, first, name, t)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see the call, if only to say that there is no derivative in forward mode. Where it need
    not, the op is called without its costs."""
    given = [t for t in tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return True
    return not torch.compiler.is_compiling() and any(unpack_dual(t).tangent is not None for t in given)


def same_device(op: str, first_name: str, first: Tensor, name: str, t: Tensor) -> None:
    if t.device != first.device:
        places = f"{name} is on {t.device} and {first_name} is on {first.device}"
        raise ValueError(f"{op}: {places}; they must be on one device")


def integer(op: str, name: str, value: object, low: int, high: int) -> None:
    # torch.compile and torch.export hand symbolic sizes in
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be between {low} and {high}, got {value}")
