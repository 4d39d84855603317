"""Input normalisers: x -> (x_normalised, offset, scale) with x = x_normalised * scale + offset."""

import torch
from torch import Tensor, nn

NORMALIZERS = ("none", "standardize", "l2", "layer_norm", "global")
_LAYER_NORM_EPS = 1e-5  # as in Gao et al. 2024


class Normalizer(nn.Module):
    """One of NORMALIZERS over the last dimension of x [..., d_in]; never changes x in place.

    "none": x itself. "standardize": minus the row's mean, over its standard deviation. "l2": unit norm.
    "layer_norm": minus the row's mean, over (its unbiased standard deviation + 1e-5).
    "global": one mean vector and one scalar for all rows, set by `fit`; RuntimeError where it is used before.

    A row of zeros, and under the two centring ones any constant row, becomes a row of zeros with a finite gradient, and
    comes back as it was. bf16 and fp16 are normalised, and returned, in float32.
    """

    def __init__(
        self, name: str, d_in: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if name not in NORMALIZERS:
            raise ValueError(f"normalize must be one of {', '.join(NORMALIZERS)}, got {name!r}")
        self.name, self.d_in = name, d_in
        self.fitted = name != "global"
        if name == "global":
            self.register_buffer("mean", torch.zeros(d_in, device=device, dtype=dtype))
            self.register_buffer("scale", torch.ones(1, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return self.name if self.fitted else f"{self.name}, not fitted"

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Sets the global mean, and the scale to the root mean square of what is left, from x [..., d_in]."""
        if self.name != "global":
            raise ValueError(f"fit: only the normaliser 'global' is fitted, this one is {self.name!r}")
        rows = x.reshape(-1, self.d_in)
        if rows.shape[0] == 0:
            raise ValueError(f"fit: x {tuple(x.shape)} has no rows")
        mean = rows.mean(0, dtype=torch.float64)
        square = torch.zeros((), dtype=torch.float64, device=rows.device)
        for part in rows.split(max(1, 2**20 // self.d_in)):
            square += (part.double() - mean).square().sum()
        rms = (square / rows.numel()).sqrt()
        if not torch.isfinite(rms):
            raise ValueError("fit: x holds NaN or Inf")
        self.mean.copy_(mean)
        self.scale.fill_(rms.item() or 1.0)
        self.fitted = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.name == "none":
            return x, None, None
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        if self.name == "global":
            if not self.fitted:
                raise RuntimeError("the normaliser 'global' has no mean and scale yet: call fit_normalizer(x) first")
            mean, scale = self.mean.to(wide.dtype), self.scale.to(wide.dtype)
            return (wide - mean) / scale, mean, scale
        if self.name == "l2":
            return _l2(wide)
        return _centred(wide, layer_norm=self.name == "layer_norm")


def _l2(x: Tensor) -> tuple[Tensor, None, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1), None, norm


def _centred(x: Tensor, layer_norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    d = x.shape[-1]
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    norm = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    # the mean of a constant row is off by rounding: what is left of such a row is noise, not signal
    alive = norm > 4 * torch.finfo(x.dtype).eps * d**0.5 * mean.abs()
    scale = norm / max(d - 1, 1) ** 0.5 + _LAYER_NORM_EPS if layer_norm else norm / d**0.5
    inverse = torch.where(alive, 1 / torch.where(alive, scale, 1), 0)
    normalised = centred * inverse if centred.requires_grad else centred.mul_(inverse)
    return normalised, mean, torch.where(alive, scale, 0)


def geometric_median(rows: Tensor, steps: int = 64) -> Tensor:
    """Weiszfeld's iteration on rows [N, d]."""
    centre = rows.mean(0)
    floor = torch.finfo(rows.dtype).eps * rows.abs().max().clamp(min=1)
    for _ in range(steps):
        pull = 1 / (rows - centre).norm(dim=-1).clamp(min=floor)
        centre = pull @ rows / pull.sum()
    return centre
