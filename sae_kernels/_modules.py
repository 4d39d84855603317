"""Finding a module by its name, and the tensor within its output; modules in eval mode for a while."""

import copy
import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Eval mode inside the block, for every module of the model; each one's training flag comes back as it was."""
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
        _check_not_inside_a_compiled_one(modules, name)
        return modules[name]
    if name == "":
        raise ValueError(f"'' is the whole model; name one of its modules: {_some(list(modules))}")
    near = difflib.get_close_matches(name, modules, n=5, cutoff=0.4)
    inside = [other for other in modules if name.lower() in other.lower() and other not in near]
    raise ValueError(
        f"{type(model).__name__} has no module {name!r}; "
        + (f"nearest: {_some(near + inside)}" if near or inside else f"it has: {_some(list(modules))}")
    )


def _check_not_inside_a_compiled_one(modules: dict[str, nn.Module], name: str) -> None:
    parts = name.split(".")
    for outer in (".".join(parts[:n]) for n in range(1, len(parts))):
        module = modules[outer]
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"module {outer!r}, which {name!r} is inside, is compiled, and ignores later hooks; name {outer!r} "
                "itself, or compile after attaching"
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
