"""record: the outputs of named modules, while the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._modules import find_module, get_tensor, tensor_key
from ._target import (
    Mask,
    MaskSource,
    check_positions,
    check_rows,
    in_backward,
    last_position,
    unnested,
)


class record:
    """Collects what the named modules put out inside the `with` block.

        with sk.record(model, "encoder") as rec:
            model(batch)
        rec.activations                  # [rows, d]; a dict by name where several names were given

    names: one dotted name or a list of them. Outputs: a tensor, or the first tensor of a tuple, list, dict or
    dataclass; output_index or output_key picks another. [B, d] gives B rows, [B, T, d] gives B * T.
    mask: True (or 1) where a position is real, of the output's leading shape; the others are dropped before anything is
    stored. A tensor, also assignable as `rec.mask` before each forward pass, or a callable on the inputs of the model.
    positions: "all", or "last" for the last real position of every sequence of [B, T, d].
    detach: False keeps the graph. to: a dtype or device for what is stored. Rows are copied, so a later in-place
    operation of the model does not change them. stop: the forward pass ends, and the block with it, as soon as every
    named module has run: what the model would compute after them is not needed.

    `places` says where each row comes from, and `leading_shapes` what that counts in.

    ValueError for an unknown name (it lists the nearest ones) or a mask that does not fit; TypeError for an output
    without a tensor; RuntimeError where a module never ran. The hooks go when the block ends, by an exception too.
    """

    def __init__(
        self,
        model: nn.Module,
        names: str | Sequence[str],
        *,
        mask: Mask | None = None,
        positions: str = "all",
        detach: bool = True,
        to: torch.dtype | torch.device | str | None = None,
        output_index: int | None = None,
        output_key: str | None = None,
        stop: bool = False,
    ) -> None:
        check_positions(positions)
        self._single = isinstance(names, str)
        listed = [names] if isinstance(names, str) else list(names)
        if not listed:
            raise ValueError("record: names is empty")
        self._modules = {name: find_module(model, name) for name in listed}
        self._parts: dict[str, list[Tensor]] = {name: [] for name in listed}
        self._model, self._mask, self._source = model, mask, None
        self._positions, self._detach, self._to = positions, detach, to
        self._index, self._key, self.stop = output_index, output_key, stop
        self._places: dict[str, list[tuple[torch.Size, Tensor | None]]] = {name: [] for name in listed}
        self._handles: list[Any] = []

    def __enter__(self) -> record:
        if self._handles:
            raise RuntimeError("record: this recorder is already running")
        self._source = MaskSource(self._model, self._mask, "record")
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        self._handles.append(self._source)
        self._waiting = set(self._modules)
        return self

    def __exit__(self, kind: type | None, *exc: object) -> bool:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._source = None
        return kind is _Stop

    @property
    def mask(self) -> Mask | None:
        return self._mask

    @mask.setter
    def mask(self, mask: Mask | None) -> None:
        self._mask = mask
        if self._source is not None:
            self._source.mask = mask

    @property
    def activations(self) -> Tensor | dict[str, Tensor]:
        """Everything recorded so far, [rows, d]; a dict by name where several names were given."""
        result = {name: self._joined(name) for name in self._parts}
        return next(iter(result.values())) if self._single else result

    @property
    def leading_shapes(self) -> list[torch.Size] | dict[str, list[torch.Size]]:
        """The shape without d of every output recorded, [B] or [B, T]; a dict by name for several names."""
        result = {name: [shape for shape, _ in calls] for name, calls in self._places.items()}
        return next(iter(result.values())) if self._single else result

    @property
    def places(self) -> Tensor | dict[str, Tensor]:
        """[rows] int64: each row's number among all positions of its output, b * T + t; a dict for several names."""
        result = {
            name: torch.cat([_numbers(shape, kept) for shape, kept in calls]) if calls else torch.empty(0).long()
            for name, calls in self._places.items()
        }
        return next(iter(result.values())) if self._single else result

    def clear(self) -> None:
        """Forgets what was recorded; recording goes on."""
        for parts in (*self._parts.values(), *self._places.values()):
            parts.clear()

    def _joined(self, name: str) -> Tensor:
        parts = self._parts[name]
        if not parts:
            raise RuntimeError(f"record: module {name!r} never ran inside the `with` block")
        if len(parts) > 1:
            parts[:] = [torch.cat(parts)]
        return parts[0]

    def _hook(self, name: str):
        def store(module: nn.Module, args: tuple, output: Any) -> None:
            if in_backward():
                return
            where = f"record {name!r}"
            x = get_tensor(output, tensor_key(output, where, self._index, self._key))
            x, mask = unnested(x, self._source.current(x.device))
            check_rows(x, where, self._positions, mask)
            rows, kept = self._rows(x.detach() if self._detach else x, mask)
            self._parts[name].append(rows)
            self._places[name].append((x.shape[:-1], kept))
            self._waiting.discard(name)
            if self.stop and not self._waiting:
                raise _Stop

        return store

    def _rows(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The rows to keep, copied, and their numbers; None for all in order."""
        numbers = None
        if self._positions == "last":
            length = x.shape[-2]
            last, mask = last_position(x, mask)
            x = x.take_along_dim(last[..., None, None], dim=-2).squeeze(-2) if length else x[..., :0, :].sum(-2)
            numbers = (torch.arange(last.numel(), device=x.device).view_as(last) * length + last).reshape(-1)
        rows = x.reshape(-1, x.shape[-1])
        if mask is None:
            return (rows.clone() if self._to is None else rows.to(self._to, copy=True)), numbers
        kept = mask.reshape(-1).nonzero().squeeze(1)
        rows = rows[kept]
        return (rows if self._to is None else rows.to(self._to)), kept if numbers is None else numbers[kept]


class _Stop(Exception):
    """Ends a forward pass that has given all that was asked for."""


def _numbers(shape: torch.Size, kept: Tensor | None) -> Tensor:
    return torch.arange(shape.numel()) if kept is None else kept
