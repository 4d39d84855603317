"""attach: a model runs through an SAE at a named module, and can be steered there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._modules import find_module, get_tensor, put_tensor, tensor_key
from ..nn import SparseCode, TopKSAE
from ._target import (
    Mask,
    MaskSource,
    check_positions,
    check_rows,
    last_position,
    nested_like,
    unnested,
)

Edit = Callable[[SparseCode], SparseCode]


def attach(
    model: nn.Module,
    name: str,
    sae: TopKSAE,
    *,
    edit: Edit | None = None,
    error_term: bool = False,
    positions: str = "all",
    mask: Mask | None = None,
    output_index: int | None = None,
    output_key: str | None = None,
    detach_code: bool = True,
) -> AttachHandle:
    """From now on the module's output is what the SAE makes of it; the rest of a tuple, dict or dataclass stays.

    name: the dotted name of a module whose output is [B, d] or [B, T, d], or holds such a tensor (the first one, unless
    output_index or output_key picks another). sae: a TopKSAE of that d, on the same device; it does not become part of
    the model. edit: a function of the SparseCode [..., k] that returns the code to decode.
    error_term: adds back what the SAE does not explain, so that the output is x + decode(edited) - decode(code): an
    edit changes only what it edits, and without an edit the output is x itself.
    positions: "all", or "last" for the last real position of every sequence of [B, T, d]; the others stay bit for bit.
    mask: True (or 1) where a position is real, of the output's leading shape: a tensor (also assignable as
    `handle.mask`) or a callable on the inputs of the model. Masked positions stay as they were, and their values in the
    code are 0. detach_code: False keeps handle.code in the graph.

    Gradients flow through the SAE, frozen or not. Raises ValueError for an unknown name (it lists the nearest ones),
    for the whole model, and where the module has an SAE already.
    """
    module = find_module(model, name)
    where = (positions, mask, output_index, output_key)
    return AttachHandle(model, module, name, sae, edit, error_term, *where, detach_code)


class AttachHandle:
    """An SAE in place. `edit`, `mask` and `error_term` can be set at any time; `code` is the last code, before the edit
    ([..., k]; [B, k] for positions="last"); remove(), or leaving its one `with` block, restores the model."""

    code: SparseCode | None

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        name: str,
        sae: TopKSAE,
        edit: Edit | None,
        error_term: bool,
        positions: str,
        mask: Mask | None,
        output_index: int | None,
        output_key: str | None,
        detach_code: bool,
    ) -> None:
        check_positions(positions)
        if not isinstance(sae, TopKSAE):
            raise TypeError(f"attach: sae must be a TopKSAE, got {type(sae).__name__}")
        if any(isinstance(getattr(hook, "__self__", None), AttachHandle) for hook in module._forward_hooks.values()):
            raise ValueError(f"attach: module {name!r} has an SAE already; remove() that handle first")
        self.sae, self.edit, self.error_term, self.code = sae, edit, error_term, None
        self._where, self._positions, self._detach = f"attach {name!r}", positions, detach_code
        self._index, self._key = output_index, output_key
        self._source = MaskSource(model, mask, "attach")
        self._handles = [self._source, module.register_forward_hook(self._hook)]
        self._entered = False

    @property
    def mask(self) -> Mask | None:
        return self._source.mask

    @mask.setter
    def mask(self, mask: Mask | None) -> None:
        self._source.mask = mask

    def remove(self) -> None:
        """Restores the model; harmless when repeated."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> AttachHandle:
        if self._entered or not self._handles:
            raise RuntimeError(f"{self._where}: this handle was entered or removed already; attach the SAE again")
        self._entered = True
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def _hook(self, module: nn.Module, args: tuple, output: Any) -> Any:
        key = tensor_key(output, self._where, self._index, self._key)
        original = get_tensor(output, key)
        x, mask = unnested(original, self._source.current(original.device))
        check_rows(x, self._where, self._positions, mask)
        if x.shape[-1] != self.sae.d_in:
            raise ValueError(
                f"{self._where}: the output {tuple(x.shape)} must end in the SAE's d_in = {self.sae.d_in} "
                f"of W_enc {tuple(self.sae.W_enc.shape)}"
            )
        changed = self._last(x, mask) if self._positions == "last" else self._all(x, mask)
        return output if changed is x else put_tensor(output, key, nested_like(changed, original))

    def _all(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return self._through(x, None)
        # rows that do not count may hold anything: they go in as zeros, and come out as they were
        keep = mask.unsqueeze(-1)
        rows = torch.where(keep, x, 0)
        changed = self._through(rows, keep)
        return x if changed is rows else torch.where(keep, changed, x)

    def _last(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if x.shape[-2] == 0:
            return x
        last, real = last_position(x, mask)
        rows = x.take_along_dim(last[..., None, None], dim=-2).squeeze(-2)
        rows = rows if mask is None else torch.where(real.unsqueeze(-1), rows, 0)
        changed = self._through(rows, None if mask is None else real.unsqueeze(-1))
        if changed is rows:
            return x
        here = torch.arange(x.shape[-2], device=x.device) == last.unsqueeze(-1)
        return torch.where((here & real.unsqueeze(-1)).unsqueeze(-1), changed.unsqueeze(-2), x)

    def _through(self, x: Tensor, keep: Tensor | None) -> Tensor:
        # half precision in the SAE's own precision, so that the error term is not lost in rounding
        wide = x.to(torch.promote_types(x.dtype, self.sae.W_enc.dtype))
        code = self.sae.encode(wide)
        if keep is not None:
            code = code.replace(values=torch.where(keep, code.values, 0))
        self.code = code.detach() if self._detach else code
        edited = code if self.edit is None else self.edit(code)
        if not isinstance(edited, SparseCode):
            raise TypeError(f"{self._where}: edit must return a SparseCode, got {type(edited).__name__}")
        if not self.error_term:
            return self.sae.decode(edited).to(x.dtype)
        if edited is code:
            return x
        return (wide + self.sae.decode_difference(edited, code)).to(x.dtype)
