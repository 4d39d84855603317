"""What the ops do where plain torch takes the place of a kernel."""

import pytest
import torch

import sae_kernels as sk
from sae_kernels.ops.refit_values import refit_values


def losses(x, W, b):
    """A scalar per op that has gradients."""
    values, indices = sk.topk_encode(x, W, b, 5)
    passed = sk.threshold_encode(x, W, b, torch.tensor(0.5), max_active=7)[0]
    decoded = sk.sparse_decode(values, indices, W)
    errors = sk.sae_loss(x, values, indices, W, prefixes=[2, 5]).errors
    return {"topk": values.square().sum(), "threshold": passed.square().sum(), "decode": decoded.square().sum(),
            "loss": errors.sum()}  # fmt: skip


@pytest.mark.parametrize("op", ["topk", "threshold", "decode", "loss"])
def test_backward_under_autocast_rounds_nothing(op):
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*s, generator=g, requires_grad=True) for s in ((6, 10), (20, 10), (20,))]
    with sk.backend("reference"):
        want = torch.autograd.grad(losses(*leaves)[op], leaves, allow_unused=True)
        loss = losses(*leaves)[op]
        with torch.autocast("cpu", torch.bfloat16):
            got = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert want[1].abs().sum() > 0
    for a, b in zip(got, want, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_an_index_out_of_range_is_told_by_the_op_that_was_called(backend):
    x, W, values, indices = torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 1), torch.tensor([[0], [4]])
    with sk.backend(backend):
        with pytest.raises(ValueError, match=r"^sparse_decode: indices must be in \[0, d_sae = 4\)"):
            sk.sparse_decode(values, indices, W)
        with pytest.raises(ValueError, match=r"^sae_loss: indices must be in \[0, d_sae = 4\), got values from 0 to 4"):
            sk.sae_loss(x, values, indices, W)
    with pytest.raises(ValueError, match="^refit_values: indices must be in"):
        refit_values(x, values, indices, W, 2)
