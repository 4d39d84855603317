"""TopKSAE, its normalisers, its loss and its state, against plain dense fp64 formulas."""

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from sae_kernels.nn import NORMALIZERS, Normalizer, SparseCode, TopKSAE, squared_error, total_variance

SHARED = Path(__file__).parents[2] / "shared" / "data"
EPS = torch.finfo(torch.float32).eps


def make(normalize="none", dtype=torch.float64, d_in=12, d_sae=40, k=5, seed=0, **options):
    """A TopKSAE with no parameter at a special value."""
    generator = torch.Generator().manual_seed(seed)
    sae = TopKSAE(d_in, d_sae, k, normalize=normalize, dtype=dtype, generator=generator, **options)
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1, generator=generator)
        sae.b_dec.normal_(0, 0.3, generator=generator)
        sae.W_enc.add_(0.1 * torch.randn(d_sae, d_in, generator=generator).to(dtype))
    if normalize == "global":
        sae.fit_normalizer(rows(200, d_in, seed=9).to(dtype))
    return sae


def rows(n, d=12, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) * 1.7 + 0.6).to(dtype)


def dense_normalize(sae, x):
    """x -> normalised, offset, scale, written out once more."""
    zero = torch.zeros((), dtype=x.dtype)
    mean = x.mean(-1, keepdim=True)
    if sae.normalize == "standardize":
        return (x - mean) / x.std(-1, keepdim=True, correction=0), mean, x.std(-1, keepdim=True, correction=0)
    if sae.normalize == "layer_norm":
        scale = x.std(-1, keepdim=True) + 1e-5
        return (x - mean) / scale, mean, scale
    if sae.normalize == "l2":
        return x / x.norm(dim=-1, keepdim=True), zero, x.norm(dim=-1, keepdim=True)
    if sae.normalize == "global":
        return (x - sae.normalizer.mean) / sae.normalizer.scale, sae.normalizer.mean, sae.normalizer.scale
    return x, zero, zero + 1


def dense_code(sae, normalized):
    pre = (normalized - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    score = {"relu": pre.relu(), "abs": pre.abs(), "none": pre}[sae.activation]
    top = score.topk(sae.k, dim=-1).indices
    value = score if sae.activation == "relu" else pre
    return torch.zeros_like(pre).scatter(-1, top, value.gather(-1, top))


def dense_fvu(sae, x, weight=None):
    normalized = dense_normalize(sae, x)[0]
    weight = torch.ones(len(x), dtype=x.dtype) if weight is None else weight.to(x.dtype)
    error = (dense_code(sae, normalized) @ sae.W_dec + sae.b_dec - normalized).square().sum(-1)
    mean = (weight[:, None] * normalized).sum(0) / weight.sum()
    return (weight * error).sum() / (weight * (normalized - mean).square().sum(-1)).sum()


def gradients(sae, loss):
    parameters = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def assert_close(ours, theirs, rtol=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * max(1.0, b.abs().max().item()))


# the code


def test_code_to_dense_adds_repeats_and_passes_gradients():
    values = torch.tensor([[1.0, 2.0, 4.0]], requires_grad=True)
    code = SparseCode(values, torch.tensor([[3, 0, 3]], dtype=torch.int32), 5)
    dense = code.to_dense()
    assert dense.tolist() == [[2.0, 0.0, 0.0, 5.0, 0.0]]
    (dense * torch.arange(5.0)).sum().backward()
    assert values.grad.tolist() == [[3.0, 0.0, 3.0]]


def test_code_replace_keeps_the_rest():
    sae = make("standardize")
    code = sae.encode(rows(4))
    other = code.replace(values=code.values * 2)
    assert other.indices is code.indices and other.scale is code.scale and other.offset is code.offset
    assert torch.equal(other.values, code.values * 2)
    with pytest.raises(ValueError, match=r"values \(4, 5\) and indices \(4, 2\)"):
        code.replace(indices=code.indices[:, :2])


# normalisers


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalizer_formula_round_trip_and_untouched_input(name):
    sae, x = make(name), rows(30)
    before = x.clone()
    normalized, offset, scale = sae.normalizer(x)
    expected, _, _ = dense_normalize(sae, x)
    assert_close([normalized], [expected])
    assert_close([normalized * (1 if scale is None else scale) + (0 if offset is None else offset)], [x])
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", NORMALIZERS[1:])
def test_normalizer_changes_the_reconstruction(name):
    x, plain, normal = rows(8), make("none"), make(name)
    assert not torch.allclose(plain(x), normal(x), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["standardize", "l2", "layer_norm"])
def test_rows_without_signal_become_zero_and_come_back(name, dtype):
    x = torch.stack([torch.zeros(12), torch.full((12,), 0.1), torch.full((12,), -321.7), rows(1)[0].float()]).to(dtype)
    dead = [0] if name == "l2" else [0, 1, 2]
    x.requires_grad_()
    normalized, offset, scale = Normalizer(name, 12)(x)
    assert torch.equal(normalized[dead], torch.zeros_like(normalized[dead]))
    assert normalized[3].abs().max() > 0.1
    back = normalized * scale + (0 if offset is None else offset)
    torch.testing.assert_close(back.to(dtype), x, rtol=8 * EPS, atol=0)
    normalized.square().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", ["standardize", "l2", "layer_norm"])
def test_normalizer_gradient(name):
    def undone(x):
        normalized, offset, scale = Normalizer(name, 6)(x)
        return normalized, scale

    assert torch.autograd.gradcheck(undone, (rows(3, 6).requires_grad_(),))


@pytest.mark.parametrize("name", NORMALIZERS)
def test_empty_history_embeds_to_zero_and_never_to_nan(name):
    sae = make(name, torch.float32)
    x = torch.cat([torch.zeros(2, 12), rows(20, dtype=torch.float32)])
    out = sae.loss(x)
    out.loss.backward()
    assert torch.isfinite(sae(x)).all() and torch.isfinite(out.loss)
    assert all(torch.isfinite(p.grad).all() for p in sae.parameters())
    if name in ("standardize", "l2"):
        assert torch.equal(sae(x)[:2], torch.zeros(2, 12))


def test_global_normalizer_must_be_fitted():
    sae, x = TopKSAE(12, 40, 5, normalize="global"), rows(50, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="fit_normalizer"):
        sae(x)
    sae.fit_normalizer(x)
    normalized = sae.normalizer(x)[0].double()
    assert normalized.mean(0).abs().max() < 1e-6
    assert abs(normalized.square().mean().item() - 1) < 1e-6
    with pytest.raises(ValueError, match="NaN"):
        sae.fit_normalizer(torch.full((3, 12), float("nan")))
    with pytest.raises(ValueError, match="no rows"):
        sae.fit_normalizer(torch.zeros(0, 12))
    with pytest.raises(ValueError, match="this one is 'l2'"):
        make("l2").fit_normalizer(x)


# encode, decode, forward


@pytest.mark.parametrize("activation", ["relu", "none", "abs"])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_forward_against_dense(name, activation):
    sae, x = make(name, activation=activation), rows(25)
    normalized, offset, scale = dense_normalize(sae, x)
    dense = dense_code(sae, normalized)
    assert_close([sae.encode(x).to_dense()], [dense])
    assert_close([sae(x)], [(dense @ sae.W_dec + sae.b_dec) * scale + offset])


def test_leading_dimensions_and_empty():
    sae, x = make("standardize"), rows(24)
    shaped = x.reshape(2, 3, 4, 12)
    assert torch.equal(sae(shaped), sae(x).reshape(2, 3, 4, 12))
    assert_close([sae(x[0])], [sae(x)[0]])
    assert sae.encode(shaped).values.shape == (2, 3, 4, 5)
    assert sae.loss(shaped).code.to_dense().shape == (2, 3, 4, 40)
    assert torch.equal(sae.decode(sae.loss(shaped).code), sae(shaped))
    for empty in (x[:0], shaped[:, :0]):
        assert sae(empty).shape == empty.shape
        out = sae.loss(empty)
        assert out.loss.item() == 0 and out.l0.item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_half_precision_module(name, dtype):
    exact, x = make(name), rows(40).to(dtype)
    half = copy.deepcopy(exact).to(dtype)
    out = half(x)
    assert out.dtype == dtype
    # rounding of the weights can change the choice at the margin: compare whole reconstructions
    expected = exact(x.double())
    assert (out.double() - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm() + 0.01 * expected.norm()
    half.loss(x).loss.backward()
    assert all(p.grad.dtype == dtype and torch.isfinite(p.grad).all() for p in half.parameters())


def test_input_of_another_dtype_comes_back_in_its_own():
    sae, x = make("standardize", torch.float32), rows(30, dtype=torch.float32)
    low = x.bfloat16()
    assert sae(low).dtype == torch.bfloat16
    assert torch.equal(sae(low.float()).bfloat16(), sae.decode(sae.encode(low.float())).bfloat16())
    error = (sae(low).float() - sae(low.float())).norm() / sae(low.float()).norm()
    assert error < 4 * torch.finfo(torch.bfloat16).eps
    assert sae.loss(low).loss.item() == sae.loss(low.float()).loss.item()


def test_decode_difference():
    sae, x = make("l2"), rows(6)
    code = sae.encode(x)
    values = code.values.clone()
    values[2, 1] += 3.0
    edited = code.replace(values=values)
    delta = sae.decode_difference(edited, code)
    assert_close([delta], [sae.decode(edited) - sae.decode(code)])
    assert torch.equal(delta[[0, 1, 3, 4, 5]], torch.zeros(5, 12, dtype=torch.float64)) and delta[2].abs().max() > 0.1
    other = code.replace(values=torch.ones(6, 1, dtype=torch.float64), indices=torch.zeros(6, 1, dtype=torch.int64))
    assert_close([sae.decode_difference(other, code)], [sae.decode(other) - sae.decode(code)])


def test_in_a_sequential_gradients_reach_the_encoder():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 12), TopKSAE(12, 40, 5, normalize="standardize"), nn.Linear(12, 3)).double()
    for p in model[1].parameters():
        p.requires_grad_(False)
    x = rows(9, 7)
    model(x).square().sum().backward()
    got = model[0].weight.grad.clone()
    model[0].weight.grad = None
    hidden = model[0](x)
    normalized, offset, scale = dense_normalize(model[1], hidden)
    x_hat = (dense_code(model[1], normalized) @ model[1].W_dec + model[1].b_dec) * scale + offset
    model[2](x_hat).square().sum().backward()
    assert_close([got], [model[0].weight.grad])


def test_recsae_reference_outputs():
    numpy = pytest.importorskip("numpy")
    path = SHARED / "models" / "recsae_ml1m_sae_k16_2048.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    data = {name: torch.from_numpy(array) for name, array in numpy.load(path).items()}
    sae = TopKSAE(64, 2048, 16)
    with torch.no_grad():
        for name, theirs in {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}.items():
            getattr(sae, name).copy_(data[theirs])
        sae.W_dec.copy_(data["W_dec"])
        sae.b_dec.copy_(data["b_dec"])
        acts = data["acts"].float()
        code = sae.encode(acts)
        expected, order = data["topk_val"].float().sort(dim=-1, descending=True)
        torch.testing.assert_close(code.values, expected, rtol=1e-5, atol=1e-5)
        same = code.indices.long() == data["topk_idx"].long().gather(-1, order)
        # indices may only differ where two values are equal up to rounding
        gap = (expected[:, :-1] - expected[:, 1:]).abs()
        near = torch.nn.functional.pad(gap < 1e-5, (0, 1), value=True) | torch.nn.functional.pad(gap < 1e-5, (1, 0))
        assert (same | near).all() and same.float().mean() > 0.99
        n = len(data["recon"])
        torch.testing.assert_close(sae(acts[:n]), data["recon"].float(), rtol=1e-5, atol=1e-5)


# the loss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_loss_and_gradients_against_dense(name, weighted):
    sae, x = make(name), rows(60)
    weight = torch.rand(60, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) if weighted else None
    out = sae.loss(x, weight)
    expected = dense_fvu(sae, x, None if weight is None else weight.float())
    assert_close([out.mse, out.loss], [expected, expected], rtol=1e-6 if weighted else 1e-10)
    assert_close(gradients(sae, out.loss), gradients(sae, expected), rtol=1e-6 if weighted else 1e-10)


@pytest.mark.parametrize("weighted", [False, True])
def test_large_batches_go_block_by_block_to_the_same_numbers(weighted):
    sae, x = make("none", d_in=300, d_sae=24, k=3), rows(7100, 300)
    assert x.numel() > 2**21
    weight = (torch.arange(7100) % 3 > 0) if weighted else None
    out, expected = sae.loss(x, weight), dense_fvu(sae, x, weight)
    assert_close([out.mse], [expected])
    assert_close(gradients(sae, 3 * out.loss), gradients(sae, 3 * expected), rtol=1e-9)
    with torch.no_grad():
        assert_close([sae.loss(x, weight).mse], [expected])
    sae.W_dec.requires_grad_(False)
    part = torch.autograd.grad(sae.loss(x, weight).loss, [sae.W_enc, sae.b_dec])
    assert_close(part, torch.autograd.grad(dense_fvu(sae, x, weight), [sae.W_enc, sae.b_dec]), rtol=1e-9)


def test_loss_gradient_reaches_an_input_that_wants_one():
    sae, x = make("none"), rows(20).requires_grad_()
    variance = total_variance(x)
    ours = torch.autograd.grad(sae.loss(x).mse * variance, x)[0]
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


def dense_aux(sae, x, dead, k, activation="relu"):
    residual = (x - sae.b_dec - dense_code(sae, x) @ sae.W_dec).detach()
    pre = (x - sae.b_dec.detach()) @ sae.W_enc.T + sae.b_enc
    score = torch.where(dead, pre.relu(), 0)
    top = score.topk(k, dim=-1).indices
    code = torch.zeros_like(pre).scatter(-1, top, score.gather(-1, top))
    return (code @ sae.W_dec - residual).square().sum() / residual.square().sum()


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
    assert out.aux.item() == 0 and out.loss.item() == out.mse.item()
    # the same through the path that a compiled graph takes
    from sae_kernels.nn.loss import auxk_loss

    none = torch.zeros(10, dtype=torch.bool)
    aux = auxk_loss(x, x, sae.W_enc, sae.b_enc, sae.W_dec, torch.arange(10), none, 2, "relu", None)
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
    assert aux(aux_coef=0.5).loss.item() == pytest.approx(aux().mse.item() + 0.5 * aux().aux.item())
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


# unit norm, initialisation


def test_constrain_projects_before_and_renormalises_after():
    sae, x = make("none"), rows(50)
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.5)
    handle = sae.constrain(optimizer)
    before = sae.W_dec.detach().clone()
    sae.loss(x).loss.backward()
    raw = sae.W_dec.grad.clone()
    optimizer.step()
    tangent = raw - (raw * before).sum(-1, keepdim=True) * before
    assert_close([sae.W_dec.grad], [tangent])
    assert_close([sae.W_dec.detach()], [torch.nn.functional.normalize(before - 0.5 * tangent, dim=-1)])
    handle.remove()
    sae.W_dec.grad = before.clone()
    optimizer.step()
    assert (sae.W_dec.norm(dim=-1) - 1).abs().max() > 0.1


def test_constrain_with_a_closure_projects_what_the_closure_makes():
    sae, x = make("none"), rows(50)
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = sae.loss(x).loss
        loss.backward()
        return loss

    with sae.constrain(optimizer):
        for call in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
            before = sae.W_dec.detach().clone()
            call()
            assert (sae.W_dec.grad * before).sum(-1).abs().max() < 1e-12
            assert_close([sae.W_dec.detach().norm(dim=-1)], [torch.ones(40, dtype=torch.float64)])


def test_constrain_refuses_a_foreign_optimizer():
    sae = make()
    with pytest.raises(ValueError, match="W_dec is not among"):
        sae.constrain(torch.optim.SGD([sae.W_enc], lr=0.1))
    with pytest.raises(TypeError, match="optimizer must be"):
        sae.constrain([sae.W_dec])


def test_explicit_projection_and_rows_of_zeros():
    sae = make()
    sae.project_grad_()  # no gradient yet: nothing to do
    with torch.no_grad():
        sae.W_dec.mul_(3)[7] = 0
    sae.W_dec.grad = rows(40)
    sae.project_grad_()
    assert (sae.W_dec.grad * sae.W_dec).sum(-1).abs().max() < 1e-12
    sae.normalize_decoder_()
    norms = sae.W_dec.norm(dim=-1)
    assert norms[7] == 0
    assert_close([norms[:7].detach()], [torch.ones(7, dtype=torch.float64)])


def test_initialisation():
    tied = TopKSAE(12, 40, 5, generator=torch.Generator().manual_seed(3))
    again = TopKSAE(12, 40, 5, generator=torch.Generator().manual_seed(3))
    free = TopKSAE(12, 40, 5, tied_init=False, generator=torch.Generator().manual_seed(3))
    assert torch.equal(tied.W_enc, tied.W_dec) and tied.W_enc.data_ptr() != tied.W_dec.data_ptr()
    assert torch.equal(tied.W_dec, again.W_dec) and torch.equal(tied.W_dec, free.W_dec)
    assert not torch.equal(free.W_enc, free.W_dec)
    assert free.W_enc.abs().max() <= 12**-0.5
    torch.testing.assert_close(tied.W_dec.norm(dim=-1), torch.ones(40))


def test_init_b_dec():
    sae, x = make("standardize"), rows(400)
    normalized = sae.normalizer(x)[0]
    sae.init_b_dec(x)
    assert_close([sae.b_dec.detach()], [normalized.mean(0)])
    sae.init_b_dec(x, "geometric_median")
    pull = torch.nn.functional.normalize(normalized - sae.b_dec, dim=-1).mean(0)
    assert pull.norm() < 1e-6  # the geometric median is where the unit vectors to all points cancel
    with pytest.raises(ValueError, match="method must be"):
        sae.init_b_dec(x, "mode")
    with pytest.raises(ValueError, match="no rows"):
        sae.init_b_dec(x[:0])


# state


@pytest.mark.parametrize("name", NORMALIZERS)
def test_state_round_trips(name):
    sae, x = make(name), rows(20)
    sae.loss(x)
    expected = sae(x)
    buffer = io.BytesIO()
    torch.save(sae.state_dict(), buffer)
    buffer.seek(0)
    other = TopKSAE(12, 40, 5, normalize=name, dtype=torch.float64)
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert torch.equal(other.rows_since_fired, sae.rows_since_fired)
    for twin in (other, copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert torch.equal(twin(x), expected)
    assert all(isinstance(t, torch.Tensor) for t in sae.state_dict().values())


def test_a_checkpoint_of_another_sae_is_refused_whole():
    x = rows(20)
    for other, message in (
        (make("l2"), r"normalize='l2' \(here 'standardize'\)"),
        (make("standardize", k=4), r"k=4 \(here 5\)"),
        (make("standardize", activation="abs"), r"activation='abs' \(here 'relu'\)"),
    ):
        sae = nn.Sequential(make("standardize", seed=7))
        before = sae(x)
        with pytest.raises(ValueError, match=message):
            sae.load_state_dict({f"0.{key}": value for key, value in other.state_dict().items()})
        assert torch.equal(sae(x), before)
    state = make("standardize").state_dict()
    del state["_extra_state"]
    with pytest.raises(RuntimeError, match="_extra_state"):
        make("standardize").load_state_dict(state)
    assert json.loads(bytes(make("l2").get_extra_state().tolist()))["normalize"] == "l2"


def test_an_unfitted_checkpoint_stays_unfitted():
    fitted, empty = make("global"), TopKSAE(12, 40, 5, normalize="global", dtype=torch.float64)
    fitted.load_state_dict(empty.state_dict())
    with pytest.raises(RuntimeError, match="fit_normalizer"):
        fitted(rows(3))


def test_to_dtype_and_meta_device():
    sae = make("global").to(torch.float32)
    assert sae.normalizer.mean.dtype == torch.float32 and sae.rows_since_fired.dtype == torch.int64
    assert sae(rows(5, dtype=torch.float32)).dtype == torch.float32
    assert TopKSAE(12, 40, 5, device="meta").W_enc.is_meta


# torch's own machinery


def test_compile_training_step():
    sae = make("standardize", torch.float32, d_sae=33, dead_after=10)
    with torch.no_grad():
        sae.W_enc[:9] *= 0.1  # too weak for the main code
        sae.b_enc[:9] = 0
    twin, x = copy.deepcopy(sae), rows(64, dtype=torch.float32)
    compiled = torch.compile(lambda batch: sae.loss(batch), fullgraph=True)
    for batch, silent in ((x, 100), (x + 0.1, 100), (x, 0)):
        for module in (sae, twin):
            module.rows_since_fired.fill_(-100)[:9] = silent - 64
        ours, theirs = compiled(batch), twin.loss(batch)
        assert (theirs.aux > 0) == (silent > 0)
        assert_close([ours.mse, ours.aux, ours.code.to_dense()], [theirs.mse, theirs.aux, theirs.code.to_dense()], 1e-5)
        assert_close(gradients(sae, ours.loss), gradients(twin, theirs.loss), 1e-5)
    assert torch.equal(sae.rows_since_fired, twin.rows_since_fired)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_compile_forward_fullgraph_with_dynamic_rows(name):
    sae = make(name, torch.float32)
    compiled = torch.compile(sae, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 17):
        x = rows(n, dtype=torch.float32)
        assert_close([compiled(x)], [sae(x)], 1e-5)


def test_export_with_dynamic_rows():
    sae, x = make("layer_norm", torch.float32), rows(16, dtype=torch.float32)
    program = torch.export.export(sae, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    other = rows(7, seed=4, dtype=torch.float32)
    assert_close([program.module()(other)], [sae(other)], 1e-5)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.sae = sae

        def forward(self, batch):
            return self.sae.encode(batch)

    code = torch.export.export(Encoder(), (x,)).module()(x)
    assert isinstance(code, SparseCode) and code.d_sae == 40
    assert_close([code.to_dense()], [sae.encode(x).to_dense()], 1e-5)


def test_autocast_keeps_the_selection_in_the_parameters_precision():
    sae, x = make("standardize", torch.float32), rows(50, dtype=torch.float32)
    low = x.bfloat16()
    expected, loss = sae(x), sae.loss(x).loss
    grads = gradients(sae, loss)
    with torch.autocast("cpu", torch.bfloat16):
        out, inside = sae(x), sae.loss(x).loss
        assert sae(low).dtype == torch.bfloat16
    assert out.dtype == torch.float32
    assert_close([out, inside], [expected, loss], 1e-5)
    assert_close(gradients(sae, inside), grads, 1e-5)


def test_distributed_data_parallel(tmp_path):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    class Step(nn.Module):
        def __init__(self, sae):
            super().__init__()
            self.sae = sae

        def forward(self, batch):
            return self.sae.loss(batch)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        sae, x = make("standardize", torch.float32), rows(40, dtype=torch.float32)
        twin = copy.deepcopy(sae)
        DistributedDataParallel(Step(sae))(x).loss.backward()
        twin.loss(x).loss.backward()
        for ours, theirs in zip(sae.parameters(), twin.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
        wrapped = DistributedDataParallel(sae)
        assert torch.equal(wrapped(x), twin(x))
    finally:
        dist.destroy_process_group()


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be between 1 and 40, got 0"),
        ({"k": 41}, "k must be between 1 and 40, got 41"),
        ({"d_in": 0}, "d_in must be between"),
        ({"d_sae": 0}, "d_sae must be between"),
        ({"k_aux": 41}, "k_aux must be between 1 and 40"),
        ({"aux_coef": -1.0}, "aux_coef must be at least 0"),
        ({"aux_rows": 0}, "aux_rows must be"),
        ({"dead_after": -1}, "dead_after must be"),
        ({"activation": "gelu"}, "activation must be one of relu, none, abs, got 'gelu'"),
        ({"normalize": "batch"}, "normalize must be one of none, standardize"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TopKSAE(**{"d_in": 12, "d_sae": 40, "k": 5, **options})


def test_bad_types():
    with pytest.raises(TypeError, match="k must be an int, got float"):
        TopKSAE(12, 40, 5.0)
    with pytest.raises(TypeError, match="must be float32"):
        TopKSAE(12, 40, 5, dtype=torch.complex64)


def test_bad_input():
    sae = make()
    for call in (sae, sae.encode, sae.loss, sae.init_b_dec):
        with pytest.raises(ValueError, match=r"x \(3, 11\) must end in d_in = 12 of W_enc \(40, 12\)"):
            call(torch.zeros(3, 11))
        with pytest.raises(TypeError, match="x must be float32.* got torch.int64"):
            call(torch.zeros(3, 12, dtype=torch.int64))
        with pytest.raises(TypeError, match="x must be a tensor, got list"):
            call([1.0])
    with pytest.raises(ValueError, match="x is on meta"):
        sae(torch.zeros(3, 12, device="meta"))
    with pytest.raises(ValueError, match=r"weight \(4,\) must have the leading shape of x \(3, 12\)"):
        sae.loss(torch.zeros(3, 12), torch.ones(4))
    with pytest.raises(TypeError, match="weight must be bool or floating, got torch.int64"):
        sae.loss(torch.zeros(3, 12), torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="code must be a SparseCode, got Tensor"):
        sae.decode(torch.zeros(3, 12))
    with pytest.raises(ValueError, match="code has d_sae = 41, this SAE has 40"):
        sae.decode(make(d_sae=41).encode(rows(2)))
