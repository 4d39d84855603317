"""Refitted values: against least squares in float64, what they leave alone, and as a property of every SAE."""

import pytest
import torch

from sae_kernels.hooks import attach
from sae_kernels.nn import BatchTopKSAE, JumpReLUSAE, TopKSAE
from sae_kernels.train import load_sae, save_sae

D_IN, D_SAE, K = 24, 80, 6


def make(cls=TopKSAE, dtype=torch.float64, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    sae = cls(D_IN, D_SAE, K, dtype=dtype, generator=g, **options)
    with torch.no_grad():
        sae.b_dec.normal_(0, 0.3, generator=g)
        sae.W_dec.mul_(torch.rand(D_SAE, 1, generator=g) + 0.5)
        if isinstance(sae, BatchTopKSAE):
            sae.threshold.fill_(1.0)
    return sae.eval()


def rows(n=50, dtype=torch.float64, seed=1):
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def least_squares(sae, x, code):
    """The dense fit of every row, in float64, on the latents of value other than 0; [n, d_sae]."""
    W, z = sae.W_dec.detach().double(), sae.normalizer(x.double())[0] - sae.b_dec.detach().double()
    dense = torch.zeros(len(x), sae.d_sae, dtype=torch.float64)
    for row, (values, indices) in enumerate(zip(code.values, code.indices.long(), strict=True)):
        chosen = indices[values != 0]
        dense[row, chosen] = torch.linalg.lstsq(W[chosen].T, z[row].unsqueeze(1)).solution.squeeze(1)
    return dense


def error(sae, x):
    return (sae(x) - x).square().sum(-1)


@pytest.mark.parametrize("activation", ["none", "relu", "abs"])
@pytest.mark.parametrize("normalize", ["none", "standardize"])
def test_k_steps_are_the_least_squares_fit(activation, normalize):
    sae, x = make(activation=activation, normalize=normalize), rows()
    plain = sae.encode(x)
    sae.refit = K
    code, wanted = sae.encode(x), least_squares(sae, x, plain)
    if activation == "relu":
        assert (wanted < 0).any()  # or the bound shows nothing
        wanted = wanted.clamp(min=0)
    torch.testing.assert_close(code.to_dense(), wanted, rtol=1e-6, atol=1e-7)
    assert torch.equal(code.indices.sort().values, plain.indices.sort().values)
    strength = code.values.abs() if activation == "abs" else code.values
    assert (strength.diff(dim=-1) <= 0).all()
    assert code.scale is None or torch.equal(code.scale, plain.scale)


def test_every_step_comes_closer_in_every_row():
    sae, x = make(activation="none"), rows(200)
    errors = []
    for sae.refit in range(K + 1):
        errors.append(error(sae, x))
    for before, after in zip(errors, errors[1:], strict=False):
        assert (after <= before * (1 + 1e-12)).all()
    assert errors[4].sum() < errors[0].sum() * 0.9


def test_slots_that_do_not_fire_stay_silent():
    for cls in (BatchTopKSAE, JumpReLUSAE):
        sae, x = make(cls, max_active=20), rows()
        plain = sae.encode(x)
        assert (plain.values == 0).any() and (plain.values != 0).sum(1).max() > 1
        sae.refit = 300
        code = sae.encode(x)
        wanted = least_squares(sae, x, plain).clamp(min=0)
        torch.testing.assert_close(code.to_dense(), wanted, rtol=1e-5, atol=1e-6)
    code = make(refit=3).encode(torch.zeros(2, D_IN, dtype=torch.float64) + make().b_dec)  # nothing is above 0
    assert (code.values == 0).all()


def test_equal_decoder_rows_share_what_they_stand_for():
    sae = make(activation="none")
    with torch.no_grad():
        sae.W_dec[:] = sae.W_dec[:1]
    sae.refit = 4
    x = rows(5)
    code, unit = sae.encode(x), sae.W_dec[0] / sae.W_dec[0].norm()
    wanted = ((x - sae.b_dec) @ unit).unsqueeze(1) * unit + sae.b_dec
    assert code.values.isfinite().all()
    torch.testing.assert_close(sae.decode(code), wanted)


def test_a_row_of_nan_spoils_no_other_and_no_rows_are_none():
    sae, x = make(refit=4), rows(6)
    wanted = sae.encode(x)
    x[2, 3] = torch.nan
    code = sae.encode(x)
    keep = torch.arange(6) != 2
    assert torch.equal(code.values[keep], wanted.values[keep]) and code.values[2].isnan().all()
    assert sae.encode(x[:0]).values.shape == (0, K)
    deep = sae.encode(rows(6).reshape(2, 3, D_IN))
    assert torch.equal(deep.values.reshape(6, K)[keep], wanted.values[keep]) and deep.indices.shape == (2, 3, K)


def test_loss_and_gradients_are_those_of_the_encoder():
    plain, sae, x = make().train(), make(refit=4).train(), rows()
    assert torch.equal(plain.loss(x).loss, sae.loss(x).loss)
    grads = []
    for one in (plain, sae):
        given = x.clone().requires_grad_()
        code = one.encode(given)
        pull = torch.arange(D_SAE, dtype=torch.float64)[code.indices.long()]  # the same for a latent in any place
        (code.values * pull).sum().backward()
        grads.append((given.grad, one.W_enc.grad, one.b_enc.grad))
    for wanted, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        assert not sae.encode(x).values.requires_grad


def test_it_belongs_to_the_sae_in_hooks_and_in_checkpoints(tmp_path):
    sae, x = make(dtype=torch.float32, refit=4), rows(dtype=torch.float32)
    model = torch.nn.Sequential(torch.nn.Identity())
    with attach(model, "0", sae):
        assert torch.equal(model(x), sae(x))
    assert error(sae, x).sum() < 0.95 * error(make(dtype=torch.float32), x).sum()
    save_sae(sae, tmp_path / "sae")
    again = load_sae(tmp_path / "sae")
    assert again.refit == 4 and torch.equal(again(x), sae(x))


def test_under_compile_and_autocast():
    sae, x = make(dtype=torch.float32, refit=3), rows(dtype=torch.float32)
    compiled = torch.compile(sae, fullgraph=True)
    torch.testing.assert_close(compiled(x), sae(x), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert error(sae, x).sum() < error(make(dtype=torch.float32), x).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_steps_do_no_harm(dtype):
    sae, x = make(dtype=dtype, activation="none"), rows(dtype=dtype)
    sae.refit = K
    wanted = sae(x)
    sae.refit = 300
    torch.testing.assert_close(sae(x), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("refit", [-1, 1.5, True])
def test_refit_must_be_a_count(refit):
    with pytest.raises((TypeError, ValueError), match="TopKSAE: refit"):
        make(refit=refit)
