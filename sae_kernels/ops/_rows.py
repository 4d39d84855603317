"""Rows of tensors of any number of dimensions, and blocks of them, so that temporaries stay small."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**20  # which a CPU's caches hold
GPU_BLOCK_ELEMENTS = 2**24  # 64 MiB of float32, beside which a launch costs nothing


def as_rows(t: Tensor) -> Tensor:
    """[..., d] -> [N, d], also where d is 0."""
    if t.dim() == 2:
        return t
    return t.unsqueeze(0) if t.dim() == 1 else t.flatten(0, -2)


def row_blocks(x: Tensor, elements: int | None = None) -> Iterator[slice]:
    """Row ranges of x [N, d] of about so many elements; one range in a compiled graph, which holds few temporaries."""
    if torch.compiler.is_compiling():
        yield slice(None)
        return
    if elements is None:
        elements = BLOCK_ELEMENTS if x.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    step = max(1, elements // max(1, x.shape[-1]))
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)
