"""Which latents fire, against a loop over the entries; by the backend of this machine, by CUDA and by Triton."""

import pytest
import torch
from kernel_device import KERNELS, on_all, on_kernels

from sae_kernels.ops import _rows
from sae_kernels.ops.fired import fired


def by_hand(values, indices, d_sae, weight=None):
    found = torch.zeros(d_sae, dtype=torch.bool)
    for row in range(len(values)):
        for value, latent in zip(values[row].tolist(), indices[row].tolist(), strict=True):
            if value != 0 and (weight is None or weight[row] > 0):
                found[latent] = True
    return found


@on_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
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


@on_all
def test_many_entries(device):
    """Of several blocks, the last pack not full; then from an address that is no multiple of 16."""
    g = torch.Generator().manual_seed(0)
    values, indices = torch.randint(2, (2501, 7), generator=g).float(), torch.randint(9000, (2501, 7), generator=g)
    weight = torch.randint(2, (2501,), generator=g)
    want, moved = by_hand(values, indices, 9000, weight), [t.to(device) for t in (values, indices, weight)]
    assert torch.equal(fired(*moved[:2], 9000, moved[2]).cpu(), want) and 0 < want.sum() < 9000
    assert moved[0][1:].data_ptr() % 16 != 0
    got = fired(moved[0][1:], moved[1][1:], 9000, moved[2][1:])
    assert torch.equal(got.cpu(), by_hand(values[1:], indices[1:], 9000, weight[1:]))


@on_kernels
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_several_ranges_of_latents(device, dtype):
    """More than have a bit in shared memory: both ends of every word fire, and nothing between them."""
    d_sae = 2_000_003 if device == "cuda" else 200_003
    latents = torch.cat([torch.arange(0, d_sae, 32), torch.arange(31, d_sae, 32)])
    found = fired(torch.ones(len(latents), 1, device=device), latents[:, None].to(device, dtype), d_sae)
    assert torch.equal(found.nonzero().flatten().cpu(), latents.sort().values)


@on_kernels
def test_an_index_out_of_range_marks_nothing(device):
    values = torch.ones(3, 4, device=device)
    narrow, wide = [-1, 70, 2**31 - 1, -(2**31)], [70, 2**32 + 1, -(2**63), -(2**32)]
    for dtype, wrong in ((torch.int32, narrow), (torch.int64, wide)):
        indices = torch.tensor([[5, 69, 0, 5], wrong, [31, *wrong[1:]]], dtype=dtype, device=device)
        assert fired(values, indices, 70).nonzero().flatten().tolist() == [0, 5, 31, 69]


@on_all
def test_nothing(device):
    values, indices = torch.zeros(3, 2, device=device), torch.zeros(3, 2, dtype=torch.int32, device=device)
    assert not fired(values, indices, 4).any() and not fired(values[:0], indices[:0], 4).any()
    assert fired(values[:, :0], indices[:, :0], 4).shape == (4,)
    assert fired(values, indices - 1, 0).shape == (0,)


@on_kernels
def test_registration(device, request):
    op = getattr(torch.ops.sae_kernels, f"fired_{request.node.callspec.params['device']}").default
    values, indices = torch.ones(3, 2, device=device), torch.zeros(3, 2, dtype=torch.int32, device=device)
    for weight in (None, torch.ones(3, device=device)):
        torch.library.opcheck(op, (values, indices, weight, 4))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_cuda_refuses_other_indices(device):
    with pytest.raises(RuntimeError, match="indices must be int32 or int64"):
        fired(torch.ones(3, 2, device=device), torch.zeros(3, 2, dtype=torch.int16, device=device), 4)


def test_cuda_goes_before_triton_and_plain_torch_stands_in(monkeypatch):
    values, indices = torch.tensor([[0.0, 2.0]]), torch.tensor([[1, 3]])
    with monkeypatch.context() as patched:
        patched.setattr("sae_kernels.ops.fired.pick", lambda device, on_cuda="triton": on_cuda)
        patched.setattr("sae_kernels.ops.fired._KERNELS", {name: lambda *_, name=name: name for name in KERNELS})
        assert fired(values, indices, 4) == "cuda"
    assert torch.ops.sae_kernels.fired_cuda(values, indices, None, 4).tolist() == [False, False, False, True]
