"""BatchTopKSAE: k latents per row on average, as many in each as it takes (Bussmann et al. 2024)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import _checks, batch_topk_encode, threshold_encode
from ..ops.reference import accumulator
from .group import mean_of_those_with_rows
from .sae import TopKSAE

_HORIZON = 100  # batches over which the threshold is averaged


class BatchTopKSAE(TopKSAE):
    """A TopKSAE whose `loss`, in training mode, keeps the k x rows strongest latents of the batch, and whose `encode`
    keeps every latent above `threshold`: a running mean of the lowest value that training kept. So a row's code never
    depends on its neighbours.

    max_active: slots of a row (default: 4 k), the most latents that it can have; codes are that wide, and slots in
    excess of a row's latents hold value 0. `threshold` [] is a buffer, 0 before training. With a `data_group` each
    process chooses over its own part of the batch. Everything else, and the other options, as in TopKSAE.
    """

    variant = "batch_topk"
    _affine_code = False
    options = (*TopKSAE.options, "max_active")

    def __init__(self, d_in: int, d_sae: int, k: int, *, max_active: int | None = None, **options: Any) -> None:
        super().__init__(d_in, d_sae, k, **options)
        self.max_active = default_slots(k, d_sae) if max_active is None else max_active
        _checks.integer(type(self).__name__, "max_active", self.max_active, k, d_sae)
        self.register_buffer("threshold", self.b_dec.new_zeros((), dtype=accumulator(self.b_dec.dtype)))
        self.register_buffer("threshold_batches", torch.zeros_like(self.rows_since_fired[0]))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, max_active={self.max_active}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BatchTopKSAE":
        before = self.threshold
        super()._apply(fn, recurse)
        # a mean that runs in 16 bits would soon stand still
        kept = self.threshold if before.is_meta else before
        self.threshold = kept.to(self.threshold.device, accumulator(self.threshold.dtype))
        return self

    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, b_enc = self._encoder_input(x)
        slots = {"max_active": self.max_active, "activation": self.activation}
        return threshold_encode(x, self.W_enc, b_enc, self.threshold, **slots)[:2]

    def _choose_to_train(self, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if not self.training:
            return super()._choose_to_train(x, weight)
        x, b_enc = self._encoder_input(x)
        slots = {"max_active": self.max_active, "activation": self.activation}
        # rows of weight 0 are no part of the batch
        here = None if weight is None else (weight > 0).nonzero().squeeze(-1)
        rows = x if here is None else x[here]
        values, indices, _, threshold = batch_topk_encode(rows, self.W_enc, b_enc, self.k, **slots)
        self._move_threshold(*mean_of_those_with_rows(threshold, x, weight, self.data_group))
        if here is not None:
            values = values.new_zeros(len(x), self.max_active).index_copy(0, here, values)
            places = torch.arange(self.max_active, dtype=torch.int32, device=x.device)
            indices = places.repeat(len(x), 1).index_copy(0, here, indices)
        return values, indices, self._firing_per_row(values)

    @torch.no_grad()
    def _move_threshold(self, threshold: Tensor, some: Tensor) -> None:
        self.threshold_batches.add_(some.to(self.threshold_batches.dtype))
        step = some * (threshold - self.threshold) / self.threshold_batches.clamp(min=1, max=_HORIZON)
        self.threshold.add_(step.to(self.threshold.dtype))

    def _conventions(self) -> dict[str, str | int | float]:
        return {**super()._conventions(), "variant": self.variant, "max_active": self.max_active}


def default_slots(k: int, d_sae: int) -> int:
    return min(4 * k, d_sae)
