"""Refitted values on the GPU's kernels, against float64 on the CPU."""

import pytest
import torch
from kernel_device import on_kernels

import sae_kernels as sk
from sae_kernels.ops.refit_values import refit_values
from sae_kernels.ops.sparse_decode import sparse_decode


@on_kernels
@pytest.mark.parametrize("dtype, share", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_as_close_as_float64(device, dtype, share):
    g = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, 16, generator=g).to(dtype) for n in (6, 40))
    values = (torch.rand(6, 5, generator=g) + 0.5).to(dtype)
    values[::2, -1] = 0
    indices = torch.rand(6, 40, generator=g).argsort(dim=1)[:, :5].int()
    found = refit_values(*(t.to(device) for t in (x, values, indices, W)), 3).cpu()
    wide = (x.double(), values.double(), indices, W.double())
    with sk.backend("reference"):
        exact = refit_values(*wide, 3)
        start, wanted, error = (
            (sparse_decode(v.double(), indices, wide[3]) - wide[0]).square().sum() for v in (values, exact, found)
        )
    assert wanted < 0.9 * start and abs(error - wanted) < share * (start - wanted)
    assert (found[::2, -1] == 0).all()
