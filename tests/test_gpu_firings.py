"""Which latents fire, against a loop over the entries; by the backend of this machine, and by Triton."""

import os

import pytest
import torch

import sae_kernels as sk
from sae_kernels.ops import _rows
from sae_kernels.ops.fired import fired

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
BACKENDS = ["auto"] if not (ON_GPU or os.environ.get("TRITON_INTERPRET") == "1") else ["auto", "triton"]


@pytest.fixture(params=BACKENDS)
def device(request):
    with sk.backend(request.param):
        yield "cuda" if ON_GPU else "cpu"


def by_hand(values, indices, d_sae, weight=None):
    found = torch.zeros(d_sae, dtype=torch.bool)
    for row in range(len(values)):
        for value, latent in zip(values[row].tolist(), indices[row].tolist(), strict=True):
            if value != 0 and (weight is None or weight[row] > 0):
                found[latent] = True
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "k", "d_sae"), [(1, 1, 1), (37, 3, 50), (300, 5, 2000)])
def test_against_a_loop(device, monkeypatch, rows, k, d_sae, dtype):
    """Zeros, NaN and negative values; rows without weight; several blocks of rows."""
    monkeypatch.setattr(_rows, "BLOCK_ELEMENTS", 64)
    generator = torch.Generator().manual_seed(rows)
    values = torch.randint(-1, 2, (rows, k), generator=generator).to(dtype)
    values[rows // 2, 0] = float("nan")
    indices = torch.randint(d_sae, (rows, k), generator=generator, dtype=torch.int32)
    weight = torch.randint(0, 3, (rows,), generator=generator).float() / 2
    for given in (None, weight):
        moved = None if given is None else given.to(device)
        for index in (indices, indices.long()):
            got = fired(values.to(device), index.to(device), d_sae, moved)
            assert got.dtype == torch.bool and torch.equal(got.cpu(), by_hand(values, indices, d_sae, given))


def test_nothing(device):
    values, indices = torch.zeros(3, 2, device=device), torch.zeros(3, 2, dtype=torch.int32, device=device)
    assert not fired(values, indices, 4).any() and not fired(values[:0], indices[:0], 4).any()
    assert fired(values[:, :0], indices[:, :0], 4).shape == (4,)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton needs a GPU or TRITON_INTERPRET=1")
def test_registration():
    device = "cuda" if ON_GPU else "cpu"
    values, indices = torch.ones(3, 2, device=device), torch.zeros(3, 2, dtype=torch.int32, device=device)
    with sk.backend("triton"):
        for weight in (None, torch.ones(3, device=device)):
            torch.library.opcheck(torch.ops.sae_kernels.fired_triton.default, (values, indices, weight, 4))
