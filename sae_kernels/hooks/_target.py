"""Finding a module by its name, the tensor within its output, and the positions of it that count."""

import copy
import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Mask = Callable[..., Tensor] | Tensor


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The module of that dotted name; ValueError with the nearest names where there is none, or for the whole model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise ValueError("model comes from torch.compile, which ignores later hooks; give the model that was compiled")
    if not isinstance(name, str):
        raise TypeError(f"the module's name must be a str, got {type(name).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    del modules[""]
    if name in modules:
        return modules[name]
    if name == "":
        raise ValueError(f"'' is the whole model; name one of its modules: {_some(list(modules))}")
    near = difflib.get_close_matches(name, modules, n=5, cutoff=0.4)
    inside = [other for other in modules if name.lower() in other.lower() and other not in near]
    raise ValueError(
        f"{type(model).__name__} has no module {name!r}; "
        + (f"nearest: {_some(near + inside)}" if near or inside else f"it has: {_some(list(modules))}")
    )


def _some(names: list[str], limit: int = 10) -> str:
    return ", ".join(map(repr, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def tensor_key(output: Any, where: str, index: int | None, key: str | None) -> Any:
    """What picks the tensor out of a module's output: None (it is the tensor), a position, or a name."""
    kind = f"the output is a {type(output).__name__}"
    if index is not None and not isinstance(output, (tuple, list)):
        raise TypeError(f"{where}: output_index = {index} needs a tuple or list, {kind}")
    if key is not None and not (isinstance(output, Mapping) or dataclasses.is_dataclass(output)):
        raise TypeError(f"{where}: output_key = {key!r} needs a dict or dataclass, {kind}")
    if isinstance(output, Tensor):
        return None
    items = _items(output)
    if items is None:
        raise TypeError(f"{where}: {kind}; expected a tensor, tuple, list, dict or dataclass")
    wanted = index if index is not None else key
    if wanted is None:
        wanted = next((name for name, value in items.items() if isinstance(value, Tensor)), None)
        if wanted is None:
            raise TypeError(f"{where}: {kind} without a tensor: {_types(items)}")
    elif isinstance(wanted, int) and wanted < 0:
        wanted += len(items)
    if not isinstance(items.get(wanted), Tensor):
        raise ValueError(f"{where}: no tensor at {wanted!r}: {kind} of {_types(items)}")
    return wanted


def _items(output: Any) -> dict[Any, Any] | None:
    if isinstance(output, (tuple, list)):
        return dict(enumerate(output))
    if isinstance(output, Mapping):
        return dict(output)
    if dataclasses.is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return None


def _types(items: dict[Any, Any]) -> str:
    return ", ".join(f"{name}: {type(value).__name__}" for name, value in items.items()) or "nothing"


def get_tensor(output: Any, key: Any) -> Tensor:
    return output if key is None else getattr(output, key) if _by_attribute(output) else output[key]


def put_tensor(output: Any, key: Any, tensor: Tensor) -> Any:
    """A shallow copy of `output`, of the same type, with `tensor` in its place."""
    if key is None:
        return tensor
    if isinstance(output, (tuple, list)):
        items = [*output[:key], tensor, *output[key + 1 :]]
        return output._make(items) if hasattr(output, "_make") else type(output)(items)
    changed = copy.copy(output)
    if _by_attribute(output):
        object.__setattr__(changed, key, tensor)  # frozen dataclasses too
    else:
        changed[key] = tensor
    return changed


def _by_attribute(output: Any) -> bool:
    return dataclasses.is_dataclass(output) and not isinstance(output, (Mapping, tuple, list))


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


class MaskSource:
    """The mask of the forward pass that is under way: a tensor, or what a callable makes of the model's own inputs."""

    def __init__(self, model: nn.Module, mask: Mask | None, where: str) -> None:
        if mask is not None and not callable(mask) and not isinstance(mask, Tensor):
            raise TypeError(f"{where}: mask must be a tensor, a callable or None, got {type(mask).__name__}")
        self.mask, self._where, self._running, self._computed = mask, where, False, None
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if _is_function(self.mask):
            self._computed, self._running = self.mask(*args, **kwargs), True

    def _after(self, model: nn.Module, args: tuple, output: Any) -> None:
        self._computed, self._running = None, False

    def current(self, device: torch.device) -> Tensor | None:
        """The mask in force as bool on `device`, True where a position is real; None for no mask."""
        mask = self.mask
        if _is_function(mask):
            if not self._running:
                raise RuntimeError(f"{self._where}: mask takes the inputs of the model, and the model was not called")
            mask = self._computed
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
