"""How well a SAE gives its input back, streamed: FVU, cosine, L0, dead share over the whole width."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

_CHUNK = 8192  # rows brought to float64 at a time


class ReconstructionMetrics:
    """Sums over batches of rows, in float64, so that the split into batches does not matter.

    d_in, d_sae: the widths. After any number of `update`s, `compute()` gives
      fvu         sum |x - x_hat|^2 / sum |x - mean|^2, the mean being that of all rows
      mse         sum |x - x_hat|^2 / (rows * d_in)
      cosine      mean over rows of cos(x, x_hat); 1 where both are zero, 0 where one is
      l0          mean number of non-zero values per row
      dead_share  share of all d_sae latents that fired on no row
      rows        rows seen
    `counts` [d_sae] int64: on how many rows each latent fired. NaN in x or x_hat makes the figures NaN.
    """

    def __init__(self, d_in: int, d_sae: int, device: torch.device | str | None = None) -> None:
        self.d_in, self.d_sae = d_in, d_sae
        self.rows = 0
        self.counts = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._mean = torch.zeros(d_in, dtype=torch.float64, device=device)
        # squared deviations from the mean per feature; squared error, cosines, non-zero values
        self._deviation = torch.zeros(d_in, dtype=torch.float64, device=device)
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def update(self, x: Tensor, x_hat: Tensor, values: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """x, x_hat [..., d_in]; values, indices [..., k]; mask [...] bool: rows that are False (padding) do not count.

        Raises ValueError naming the argument and both shapes.
        """
        if x.shape[-1:] != (self.d_in,) or x_hat.shape != x.shape:
            raise ValueError(f"x {tuple(x.shape)} and x_hat {tuple(x_hat.shape)} must both be [..., {self.d_in}]")
        if values.shape != indices.shape or values.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"values {tuple(values.shape)} and indices {tuple(indices.shape)} do not go with x {tuple(x.shape)}"
            )
        x, x_hat = x.detach().reshape(-1, self.d_in), x_hat.detach().reshape(-1, self.d_in)
        values, indices = (t.detach().reshape(-1, t.shape[-1]) for t in (values, indices))
        if mask is not None:
            if mask.dtype != torch.bool or mask.numel() != len(x):
                raise ValueError(
                    f"mask must be bool with one entry per row ({len(x)}), got {mask.dtype} {tuple(mask.shape)}"
                )
            keep = mask.reshape(-1)
            x, x_hat, values, indices = x[keep], x_hat[keep], values[keep], indices[keep]
        fired = indices[values != 0].long()
        if fired.numel() and not 0 <= int(fired.min()) <= int(fired.max()) < self.d_sae:
            raise ValueError(f"indices must be in [0, {self.d_sae}), got {int(fired.min())} to {int(fired.max())}")
        self.counts += torch.bincount(fired, minlength=self.d_sae)
        self._sums[2] += fired.numel()
        for start in range(0, len(x), _CHUNK):
            self._add(x[start : start + _CHUNK].double(), x_hat[start : start + _CHUNK].double())

    def _add(self, x: Tensor, x_hat: Tensor) -> None:
        mean = x.mean(0)
        self._merge_moments(len(x), mean, (x - mean).square().sum(0))
        norms, hat_norms = x.norm(dim=1), x_hat.norm(dim=1)
        product = norms * hat_norms
        cosines = torch.where(product == 0, (norms == hat_norms).double(), (x * x_hat).sum(1) / product)
        self._sums[0] += (x - x_hat).square().sum()
        self._sums[1] += cosines.sum()

    def _merge_moments(self, rows: int, mean: Tensor, deviation: Tensor) -> None:
        # Chan, Golub and LeVeque 1983: merging of two means and sums of squared deviations
        if rows == 0:
            return
        total, delta = self.rows + rows, mean - self._mean
        self._deviation += deviation + delta.square() * (self.rows * rows / total)
        self._mean += delta * (rows / total)
        self.rows = total

    def merge(self, other: "ReconstructionMetrics") -> "ReconstructionMetrics":
        """Adds what `other` has seen. Raises ValueError where the widths differ."""
        if (self.d_in, self.d_sae) != (other.d_in, other.d_sae):
            raise ValueError(
                f"cannot merge metrics of d_in, d_sae = {other.d_in}, {other.d_sae} into {self.d_in}, {self.d_sae}"
            )
        self._merge_moments(other.rows, other._mean.to(self._mean.device), other._deviation.to(self._mean.device))
        self._sums += other._sums.to(self._sums.device)
        self.counts += other.counts.to(self.counts.device)
        return self

    def compute(self) -> dict[str, float]:
        """The figures as Python numbers. Raises ValueError where no row has been seen."""
        if self.rows == 0:
            raise ValueError("no rows were seen: call update before compute")
        error, cosines, active = self._sums.tolist()
        total = self._deviation.sum().item()
        # equal rows have no variance: a perfect copy leaves none of it unexplained
        fvu = error / total if total else (0.0 if error == 0 else float("inf"))
        return {
            "fvu": fvu,
            "mse": error / (self.rows * self.d_in),
            "cosine": cosines / self.rows,
            "l0": active / self.rows,
            "dead_share": (self.counts == 0).double().mean().item(),
            "rows": self.rows,
        }


def reconstruction_metrics(
    sae: nn.Module,
    source: Tensor | Iterable[Tensor],
    *,
    batch_size: int = 4096,
    device: torch.device | str | None = None,
    each: Callable[[Tensor, Tensor], object] | None = None,
) -> ReconstructionMetrics:
    """Runs `sae` over source, a tensor [..., d_in] or an iterable of them: no gradients, eval mode during the call.

    each: called with the (values, indices) of every batch.
    """
    parameter = next(sae.parameters())
    device = torch.device(device) if device is not None else parameter.device
    metrics = ReconstructionMetrics(sae.d_in, sae.d_sae, device)
    training = sae.training
    sae.eval()
    try:
        with torch.inference_mode():
            for batch in [source] if isinstance(source, Tensor) else source:
                if batch.shape[-1:] != (sae.d_in,):
                    raise ValueError(f"source gave {tuple(batch.shape)}; the SAE takes [..., {sae.d_in}]")
                for part in batch.reshape(-1, sae.d_in).split(batch_size):
                    x = part.to(device, parameter.dtype)
                    code = sae.encode(x)
                    metrics.update(x, sae.decode(code), code.values, code.indices)
                    if each is not None:
                        each(code.values, code.indices)
    finally:
        sae.train(training)
    return metrics


def evaluate_reconstruction(
    sae: nn.Module,
    source: Tensor | Iterable[Tensor],
    *,
    batch_size: int = 4096,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """fvu, mse, cosine, l0, dead_share and rows of `sae` on source; see `ReconstructionMetrics`.

    source: a tensor [..., d_in] or an iterable of them. Raises ValueError where the width differs or no row came.
    """
    return reconstruction_metrics(sae, source, batch_size=batch_size, device=device).compute()
