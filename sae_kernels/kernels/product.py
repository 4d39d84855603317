"""The matrix product whose float32 results the selections read."""

import torch
from torch import Tensor


def product(x: Tensor, W: Tensor, out: Tensor) -> None:
    """out = x W^T in float32, whatever the inputs' dtype."""
    if x.dtype == torch.float32:
        torch.mm(x, W.mT, out=out)
    elif x.is_cuda:
        torch.mm(x, W.mT, out_dtype=torch.float32, out=out)
    else:
        torch.mm(x.float(), W.float().mT, out=out)
