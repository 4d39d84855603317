"""JumpReLUSAE: every latent has its own threshold, which is trained (Rajamanoharan et al. 2024)."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import _checks, batch_topk_encode, threshold_encode
from .batch_topk import default_slots
from .group import mean_of_those_with_rows, summed
from .sae import TopKSAE


class JumpReLUSAE(TopKSAE):
    """A TopKSAE whose latents fire above thresholds of their own, trained towards k latents per row on average.

    log_threshold [d_sae] is a parameter. Its gradient is the straight-through estimator of the step at the threshold,
    with a rectangle of width bandwidth x threshold about it: relative, so that it does not depend on the scale of x.
    `loss` adds l0_coef x (L0 / k - 1)^2. The first batch of training sets all thresholds to the level above which it
    has k latents per row (`init_threshold` does so before); with a `data_group` it is the mean of the levels of the
    processes' parts.

    max_active: slots of a row (default: 4 k), the most latents that it can have, the strongest ones; codes are that
    wide, and the other slots hold value 0. activation is "relu". Everything else, and the other options, as in TopKSAE.
    """

    variant = "jumprelu"
    _affine_code = False
    options = (*(name for name in TopKSAE.options if name != "activation"), "max_active", "bandwidth", "l0_coef")

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        max_active: int | None = None,
        bandwidth: float = 0.1,
        l0_coef: float = 1.0,
        **options: Any,
    ) -> None:
        if "activation" in options:
            raise ValueError(f"JumpReLUSAE: has no activation to choose, got {options['activation']!r}")
        super().__init__(d_in, d_sae, k, **options)
        self.max_active = default_slots(k, d_sae) if max_active is None else max_active
        _checks.integer("JumpReLUSAE", "max_active", self.max_active, k, d_sae)
        if not 0 < bandwidth < 2:
            raise ValueError(f"JumpReLUSAE: bandwidth must be between 0 and 2 thresholds, got {bandwidth}")
        if not l0_coef >= 0:
            raise ValueError(f"JumpReLUSAE: l0_coef must be at least 0, got {l0_coef}")
        self.bandwidth, self.l0_coef, self.started = float(bandwidth), float(l0_coef), False
        self.log_threshold = nn.Parameter(torch.zeros_like(self.b_enc))

    def extra_repr(self) -> str:
        own = f"max_active={self.max_active}, bandwidth={self.bandwidth}, l0_coef={self.l0_coef}"
        return f"{super().extra_repr()}, {own}"

    @property
    def threshold(self) -> Tensor:
        """[d_sae]: what a pre-activation must exceed."""
        return self.log_threshold.exp()

    def init_threshold(self, x: Tensor) -> None:
        """Sets every threshold to the level above which x [..., d_in] has k latents per row."""
        self._check_input(x)
        self._start(self.normalizer(x.reshape(-1, self.d_in))[0].to(self.W_enc.dtype))

    def prepare(self, x: Tensor) -> None:
        """Sets the thresholds on the first batch, where loss(x) will see copies of the weights alone."""
        if self.training and not self.started:
            self.init_threshold(x)

    @torch.no_grad()
    def _start(self, x: Tensor, weight: Tensor | None = None) -> None:
        x, b_enc = self._encoder_input(x)
        rows = x if weight is None else x[weight > 0]
        threshold = batch_topk_encode(rows, self.W_enc, b_enc, self.k, max_active=self.max_active)[3]
        threshold, some = mean_of_those_with_rows(threshold, x, weight, self.data_group)
        # the device is asked only where the answer is not at hand
        if not torch.compiler.is_compiling() and len(rows) == 0 and (self.data_group is None or not bool(some)):
            return
        self.log_threshold.fill_(1).mul_(threshold.clamp(min=torch.finfo(self.W_enc.dtype).tiny).log())
        self.started = True

    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, b_enc = self._encoder_input(x)
        return threshold_encode(x, self.W_enc, b_enc, self.threshold, max_active=self.max_active)[:2]

    def _choose_to_train(self, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if not self.training:
            return super()._choose_to_train(x, weight)
        if not self.started:
            self._start(x, weight)
        x, b_enc = self._encoder_input(x)
        threshold = self.threshold
        lowest = threshold * (1 - self.bandwidth / 2)
        values, indices, _ = threshold_encode(x, self.W_enc, b_enc, lowest, max_active=self.max_active)
        own = threshold.index_select(0, indices.reshape(-1)).view_as(values)
        values, fires = _Jump.apply(values, own, self.bandwidth)
        return values, indices, fires.sum(-1)

    def _total(self, fvu: Tensor, aux: Tensor, l0: Tensor) -> Tensor:
        whole = summed(l0.detach(), self.data_group) + (l0 - l0.detach())
        penalty = self.l0_coef * (whole / self.k - 1) ** 2
        if self.data_group is not None:  # the whole's, of which this process's share has the gradient of its own rows
            size = torch.distributed.get_world_size(self.data_group)
            penalty = penalty - penalty.detach() * (1 - 1 / size)
        return super()._total(fvu, aux, l0) + penalty

    def _conventions(self) -> dict[str, str | int | float]:
        own = {"variant": self.variant, "max_active": self.max_active, "bandwidth": self.bandwidth}
        return {**super()._conventions(), **own}

    def _progress(self) -> dict[str, bool]:
        return {**super()._progress(), "started": self.started}

    def _restore(self, found: dict[str, str | int | float | bool]) -> None:
        super()._restore(found)
        self.started = found["started"]


class _Jump(torch.autograd.Function):
    """values where they exceed the threshold, else 0; and whether they do, as 0 or 1 in float32."""

    @staticmethod
    def forward(values, threshold, bandwidth):
        fires = ~(values <= threshold)  # NaN fires
        return torch.where(fires, values, 0), fires.float()

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, threshold, ctx.bandwidth = inputs
        ctx.save_for_backward(values, threshold)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_values, grad_fires):
        values, threshold = ctx.saved_tensors
        dvalues = torch.where(values <= threshold, 0, grad_values)
        near = (values - threshold).abs() < ctx.bandwidth / 2 * threshold
        # with epsilon = bandwidth * threshold: -(threshold / epsilon) for the value, -(1 / epsilon) for the count
        slope = (grad_values + grad_fires / threshold) / -ctx.bandwidth
        return dvalues, torch.where(near, slope, 0).to(threshold.dtype), None
