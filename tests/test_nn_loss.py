"""The loss, the dead counters and AuxK against dense oracles."""

import copy
from pathlib import Path

import pytest
import torch
from sae_oracle import assert_close, dense_code, dense_fvu, gradients, make, rows

from sae_kernels.nn import NORMALIZERS, TopKSAE, squared_error, total_variance

SHARED = Path(__file__).parents[2] / "shared" / "data"
EPS = torch.finfo(torch.float32).eps


# the loss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_loss_and_gradients_against_dense(name, weighted):
    sae, x = make(name), rows(60)
    weight = torch.rand(60, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) if weighted else None
    out = sae.loss(x, weight)
    expected = dense_fvu(sae, x, None if weight is None else weight.float())
    assert_close([out.fvu, out.loss], [expected, expected], rtol=1e-6 if weighted else 1e-10)
    assert_close(gradients(sae, out.loss), gradients(sae, expected), rtol=1e-6 if weighted else 1e-10)


@pytest.mark.parametrize("weighted", [False, True])
def test_large_batches_go_block_by_block_to_the_same_numbers(weighted):
    sae, x = make("none", d_in=300, d_sae=24, k=3), rows(7100, 300)
    assert x.numel() > 2**21
    weight = (torch.arange(7100) % 3 > 0) if weighted else None
    out, expected = sae.loss(x, weight), dense_fvu(sae, x, weight)
    assert_close([out.fvu], [expected])
    assert_close(gradients(sae, 3 * out.loss), gradients(sae, 3 * expected), rtol=1e-9)
    with torch.no_grad():
        assert_close([sae.loss(x, weight).fvu], [expected])
    sae.W_dec.requires_grad_(False)
    part = torch.autograd.grad(sae.loss(x, weight).loss, [sae.W_enc, sae.b_dec])
    assert_close(part, torch.autograd.grad(dense_fvu(sae, x, weight), [sae.W_enc, sae.b_dec]), rtol=1e-9)


def test_loss_gradient_reaches_an_input_that_wants_one():
    sae, x = make("none"), rows(20).requires_grad_()
    variance = total_variance(x)
    ours = torch.autograd.grad(sae.loss(x).fvu * variance, x)[0]
    error = (dense_code(sae, x) @ sae.W_dec + sae.b_dec - x).square().sum()
    assert_close([ours], [torch.autograd.grad(error, x)[0]])


def test_masked_rows_count_nowhere_whatever_they_hold():
    sae, x = make("standardize"), rows(40).reshape(4, 10, 12)
    mask = torch.rand(4, 10, generator=torch.Generator().manual_seed(0)) > 0.4
    poisoned = torch.where(mask.unsqueeze(-1), x, float("nan"))
    plain = copy.deepcopy(sae)
    masked, alone = sae.loss(poisoned, mask), plain.loss(x[mask])
    assert_close([masked.loss, masked.l0.double()], [alone.loss, alone.l0.double()])
    assert_close(gradients(sae, masked.loss), gradients(plain, alone.loss))
    assert torch.equal(sae.rows_since_fired, plain.rows_since_fired)


def test_l0_counts_what_fires():
    sae, x = make("none"), rows(30)
    with torch.no_grad():
        sae.b_enc.sub_(1.5)
    out = sae.loss(x)
    fires = (dense_code(sae, x) != 0).sum(-1).double()
    assert fires.min() < sae.k
    assert out.l0.item() == pytest.approx(fires.mean().item(), rel=1e-6)
    first = torch.zeros(30, dtype=torch.bool)
    first[:7] = True
    assert sae.loss(x, first).l0.item() == pytest.approx(fires[:7].mean().item(), rel=1e-6)


@pytest.mark.parametrize("x", [torch.ones(5, 3), torch.zeros(5, 3), torch.tensor([[0.1, 0.2, 0.3]])])
def test_total_variance_of_equal_rows_can_be_divided_by(x):
    expected = x.square().sum().item() or 1.0
    assert total_variance(x).item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(total_variance(torch.cat([x, x + 1])), torch.tensor(x.numel() / 2), rtol=1e-5, atol=0)


def test_total_variance_far_from_zero_is_about_the_mean():
    x = rows(500, dtype=torch.float32) + 1000
    expected = (x.double() - x.double().mean(0)).square().sum().item()
    assert total_variance(x).item() == pytest.approx(expected, rel=1e-4)


def test_squared_error_gradcheck_with_weights():
    y, x = rows(5, 4).requires_grad_(), rows(5, 4, seed=2).requires_grad_()
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: squared_error(a, b, weight), (y, x))
    assert torch.autograd.gradcheck(squared_error, (y, x))


def test_training_step_is_bit_equal_on_one_and_two_threads():
    def step(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            sae = make("standardize", torch.float32, d_in=64, d_sae=512, k=8, dead_after=100)
            with torch.no_grad():
                sae.W_enc[:200] *= 0.1  # too weak for the main code, strong enough for AuxK
            sae.rows_since_fired[:200] = 1000
            out = sae.loss(rows(3000, 64, dtype=torch.float32))
            return [out.loss, out.aux, *gradients(sae, out.loss)]
        finally:
            torch.set_num_threads(before)

    one, two = step(1), step(2)
    assert one[1] > 0
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# dead latents


def test_rows_since_fired_counts_rows_in_training_mode_alone():
    sae, x = make("none"), rows(30)
    fired = (dense_code(sae, x) != 0).any(0)
    assert fired.any() and not fired.all()
    sae.loss(x)
    assert torch.equal(sae.rows_since_fired, torch.where(fired, 0, 30))
    sae.loss(x, torch.arange(30) < 10)
    early = (dense_code(sae, x[:10]) != 0).any(0)
    expected = torch.where(early, 0, torch.where(fired, 0, 30) + 10)
    assert torch.equal(sae.rows_since_fired, expected)
    sae.eval().loss(x)
    sae.train()(x)
    assert torch.equal(sae.rows_since_fired, expected)
    sae.dead_after = 10
    assert torch.equal(sae.dead, expected > 10)


def dense_aux(sae, x, dead, k):
    centred = (x - sae.b_dec).detach()
    score = torch.where(dead, (centred @ sae.W_enc.T + sae.b_enc).relu(), 0)
    top = score.topk(k, dim=-1).indices
    code = torch.zeros_like(score).scatter(-1, top, score.gather(-1, top))
    return (code @ sae.W_dec - centred).square().sum() / centred.square().sum()


def test_auxk_against_dense_and_on_dead_rows_alone():
    sae, x = make("none", k_aux=3, dead_after=1000), rows(60)
    with torch.no_grad():
        sae.b_enc[[1, 4, 6, 20, 33]] -= 1.0  # so that they stay silent in the main code
    silent = ~(dense_code(sae, x) != 0).any(0)
    silent[torch.nonzero(silent)[8:]] = False
    sae.eval()
    sae.rows_since_fired[silent] = 5000
    out = sae.loss(x)
    expected = dense_aux(sae, x, silent, 3)
    assert_close([out.aux, out.loss], [expected, dense_fvu(sae, x) + expected / 32])
    ours = gradients(sae, out.aux)
    assert_close(ours, gradients(sae, expected))
    assert ours[0][silent].abs().sum() > 0 and ours[3].abs().sum() == 0
    for grad in ours[:3]:
        assert torch.equal(grad[~silent], torch.zeros_like(grad[~silent]))


def test_auxk_is_exactly_zero_while_nothing_is_dead():
    sae, x = make("none", dead_after=1000), rows(60)
    out = sae.loss(x)
    assert out.aux.item() == 0 and out.loss.item() == out.fvu.item()
    # the same through the path that a compiled graph takes
    from sae_kernels.nn.loss import auxk_loss

    none = torch.zeros(10, dtype=torch.bool)
    aux = auxk_loss(x, sae.W_enc, sae.b_enc, sae.W_dec, torch.arange(10), none, 2, "relu", None)
    aux.backward()
    assert aux.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in (sae.W_enc, sae.b_enc, sae.W_dec))


def test_auxk_options_have_an_effect():
    x = rows(60)

    def aux(**options):
        sae = make("none", dead_after=10, **options).eval()
        sae.rows_since_fired[20:] = 50
        return sae.loss(x)

    assert aux(aux_coef=0.0).aux.item() == 0
    assert aux(aux_coef=0.5).loss.item() == pytest.approx(aux().fvu.item() + 0.5 * aux().aux.item())
    assert aux(k_aux=1).aux.item() != aux(k_aux=6).aux.item()
    assert aux(aux_rows=5).aux.item() != aux().aux.item()
    assert TopKSAE(256, 1024, 32).k_aux == 128 and TopKSAE(4096, 8192, 32).k_aux == 512 and TopKSAE(1, 2, 1).k_aux == 1


def test_auxk_brings_dead_latents_back():
    def dead_share(aux_coef):
        torch.manual_seed(0)
        atoms = torch.nn.functional.normalize(torch.randn(48, 16), dim=-1)
        sae = TopKSAE(16, 96, 3, aux_coef=aux_coef, dead_after=2000, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            sae.W_enc[48:] *= 0.05  # too weak to be chosen
        optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
        sae.constrain(optimizer)
        for _ in range(150):
            optimizer.zero_grad()
            code = torch.rand(256, 48) * (torch.rand(256, 48) < 0.06)
            sae.loss(code @ atoms).loss.backward()
            optimizer.step()
        return sae.dead.float().mean().item()

    without = dead_share(0.0)
    assert without > 0.3
    assert dead_share(1.0) < 0.5 * without


def test_how_long_a_latent_may_be_silent_goes_by_how_often_one_fires():
    assert TopKSAE(8, 64, 4).dead_after == 10_000
    assert TopKSAE(8, 4096, 4).dead_after == 102_400
    assert TopKSAE(8, 4096, 4, dead_after=7).dead_after == 7
