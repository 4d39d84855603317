"""The settings of ActivationStats, checked."""

import torch
from torch import Tensor

from . import _checks

COOCCURRENCE_BYTES = 4 * 2**30  # the largest table of co-occurrences


def bins(histogram: bool | tuple[int, int, int]) -> tuple[int, int, int] | None:
    if histogram is False:
        return None
    low, high, per_octave = (-20, 12, 8) if histogram is True else histogram
    op = "ActivationStats: histogram"
    _checks.integer(op, "low", low, -1000, 22)
    _checks.integer(op, "high", high, low + 1, 23)
    _checks.integer(op, "per_octave", per_octave, 1, 2**20)
    if per_octave & (per_octave - 1):
        raise ValueError(f"{op}: per_octave must be a power of two, got {per_octave}")
    return low, high, per_octave


def check_table(among: int | Tensor | None) -> None:
    """among: how many latents, or which; ValueError where the table of their co-occurrences would be too large."""
    latents = 0 if among is None else among if isinstance(among, int) else among.shape[0]
    if 8 * latents**2 > COOCCURRENCE_BYTES:
        largest = int((COOCCURRENCE_BYTES // 8) ** 0.5)
        raise ValueError(
            f"ActivationStats: cooccurrence among {latents} latents takes {8 * latents**2 / 1e9:.1f} GB, more than the "
            f"{COOCCURRENCE_BYTES / 1e9:.1f} GB allowed; give a tensor of at most {largest} latents to count among"
        )


def subset(cooccurrence: bool | Tensor, d_sae: int, device: torch.device) -> Tensor | None:
    if isinstance(cooccurrence, bool):
        return None
    op = "ActivationStats"
    _checks.tensor(op, "cooccurrence", cooccurrence, 1)
    if cooccurrence.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: cooccurrence must be bool or an int32 or int64 tensor, got {cooccurrence.dtype}")
    latents = cooccurrence.to(device=device, dtype=torch.int64, copy=True)
    if latents.numel() and (latents.min() < 0 or latents.max() >= d_sae or latents.unique().numel() != latents.numel()):
        raise ValueError(f"{op}: cooccurrence must hold distinct latents in [0, {d_sae}), got {latents.tolist()[:20]}")
    return latents
