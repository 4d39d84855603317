"""From a batch of inputs to rows: the model, the module whose output is kept, and what becomes of it."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..._modules import evaluating
from ...hooks import record
from ...nn import TopKSAE
from ..store.manifest import Field
from ..store.writer import id_fields
from .inputs import Batch, content_digest

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Recorded:
    """The kept rows of one batch: tensors by field, and place [rows] int64, each row's number among the batch's
    positions, width of them to an input. ragged: an input may give several rows."""

    tensors: dict[str, Tensor]
    place: Tensor
    ids: Tensor
    width: int
    ragged: bool

    def finished(self) -> dict[str, Tensor]:
        """The fields of the store; once everything is on the host."""
        width = max(self.width, 1)
        ids = {"row": self.ids[self.place // width]}
        return {**self.tensors, **ids, **({"position": (self.place % width).int()} if self.ragged else {})}

    def fields(self) -> dict[str, Field]:
        return {**{n: Field(t.dtype, tuple(t.shape[1:])) for n, t in self.tensors.items()}, **id_fields(self.ragged)}


class Recipe:
    """rows(batch) -> the kept rows of a batch, on the model's device. A context manager: the model is in eval mode
    inside. See `extract` for the arguments."""

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        module: str,
        *,
        prepare: Callable[[Any], Any] | None = None,
        mask: Any = None,
        positions: str = "all",
        output_index: int | None = None,
        output_key: str | None = None,
        dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        device: torch.device | str | None = None,
        sae: TopKSAE | None = None,
    ) -> None:
        for name, value, allowed in (("dtype", dtype, DTYPES), ("autocast", autocast, DTYPES[2:])):
            if value is not None and value not in allowed:
                raise ValueError(f"extract: {name} must be one of {', '.join(map(str, allowed))}, got {value}")
        self.model = model if isinstance(model, nn.Module) else model()
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"extract: model must be an nn.Module or make one, got {type(self.model).__name__}")
        self.module, self.prepare, self.positions, self.sae = module, prepare, positions, sae
        self.dtype, self._autocast, self.mask = dtype, autocast, mask
        self._output = {"output_index": output_index, "output_key": output_key}
        self.device = _device(self.model, device, sae)
        to = dtype if sae is None else None
        self._record = record(self.model, module, mask=mask, positions=positions, to=to, **self._output)
        self._eval, self._constant, self._probed = None, {}, None
        self.first = ""

    def __enter__(self) -> "Recipe":
        self._eval = evaluating(self.model)
        self._eval.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._eval.__exit__(None, None, None)

    def probe(self, batch: Batch) -> Recorded:
        """rows(batch), but through the whole model: ValueError where the module does not run just once in a pass.

        `first` then tells this batch from others: what the model was given, and which positions were kept.
        """
        value = self._prepared(batch)
        self._forward(value, stop=False)
        calls = len(self._record.leading_shapes)
        if calls > 1:
            self._record.clear()
            raise ValueError(f"extract: module {self.module!r} runs {calls} times in one pass; name one that runs once")
        self._probed = self._collected(batch)
        self.first = content_digest([("value", value), ("place", self._probed.place)])
        return self._probed

    def rows(self, batch: Batch) -> Recorded:
        """The pass ends at the module: what the model would do after it is not needed."""
        if self._probed is not None and torch.equal(self._probed.ids, batch.ids):
            probed, self._probed = self._probed, None  # known already
            return probed
        self._forward(self._prepared(batch), stop=True)
        return self._collected(batch)

    def describe(self) -> dict[str, Any]:
        """What decides the rows beside the inputs, as plain JSON values."""
        facts = {
            "model": type(self.model).__qualname__,
            "weights": content_digest(self.model.state_dict().items()),
            "module": self.module,
            "positions": self.positions,
            "mask": self.mask is not None,
            "autocast": None if self._autocast is None else str(self._autocast),
            **{name: value for name, value in self._output.items() if value is not None},
        }
        if self.sae is None:
            return facts
        state = [(name, t) for name, t in self.sae.state_dict().items() if isinstance(t, Tensor)]
        refit = {"refit": self.sae.refit} if self.sae.refit else {}
        return {**facts, "sae": content_digest(state), "d_sae": self.sae.d_sae, **refit, **self._constant}

    def _prepared(self, batch: Batch) -> Any:
        return batch.value if self.prepare is None else self.prepare(batch.value)

    def _forward(self, value: Any, stop: bool) -> None:
        self._record.stop = stop
        autocast = nullcontext() if self._autocast is None else torch.autocast(self.device.type, self._autocast)
        value = _moved(value, self.device)
        with torch.no_grad(), autocast, self._record:
            if isinstance(value, Mapping):
                self.model(**value)
            else:
                self.model(*value) if isinstance(value, (tuple, list)) else self.model(value)

    def _collected(self, batch: Batch) -> Recorded:
        record = self._record
        try:
            x, place, (shape,) = record.activations, record.places, record.leading_shapes
        finally:
            record.clear()
        if not shape or shape[0] != len(batch.ids):
            raise ValueError(
                f"extract: {self.module!r} puts out [{', '.join(map(str, shape))}, d] for {len(batch.ids)} inputs; "
                "its first dimension must be the inputs'"
            )
        ragged = self.positions == "all" and len(shape) > 1
        return Recorded({"x": x} if self.sae is None else self._encode(x), place, batch.ids, shape[1:].numel(), ragged)

    @torch.no_grad()
    def _encode(self, x: Tensor) -> dict[str, Tensor]:
        code = self.sae.encode(x.to(torch.promote_types(x.dtype, self.sae.W_enc.dtype)))
        values = code.values if self.dtype is None else code.values.to(self.dtype)
        tensors, self._constant = {"values": values, "indices": code.indices.int()}, {}
        for name, t in (("offset", code.offset), ("scale", code.scale)):
            if t is not None and t.shape == (len(x), 1):
                tensors[name] = t
            elif t is not None:  # one for all rows
                self._constant[name] = t.tolist()
        return tensors


def _device(model: nn.Module, wanted: torch.device | str | None, sae: TopKSAE | None) -> torch.device:
    """The device that inputs go to: the model's own, which must be the one asked for, and the SAE's."""
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    if torch.device("meta") in devices:
        raise ValueError("extract: the model is on the meta device: it has no weights yet")
    first = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device(wanted or "cpu"))
    if wanted is not None:
        wanted = torch.device(wanted)
        if wanted.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"extract: device is {wanted} and there is no CUDA device here")
        away = {d for d in devices if d.type != wanted.type or (wanted.index is not None and d.index != wanted.index)}
        if away:
            raise ValueError(f"extract: device is {wanted} and the model is on {', '.join(map(str, away))}; move it")
    if sae is not None and len(devices) == 1 and sae.W_enc.device != first:
        raise ValueError(f"extract: the sae is on {sae.W_enc.device} and the model on {first}; move one of them")
    return first


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: _moved(part, device) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(part, device) for part in value)
    return value
