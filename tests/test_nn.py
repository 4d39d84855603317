"""SparseCode, the normalisers, encode and decode against dense oracles."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_oracle import assert_close, dense_code, dense_normalize, make, rows
from torch import nn

from sae_kernels.nn import NORMALIZERS, Normalizer, SparseCode, TopKSAE

SHARED = Path(__file__).parents[2] / "shared" / "data"
EPS = torch.finfo(torch.float32).eps


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
    for changed in ({"scale": None if code.scale is None else 2 * code.scale}, {"offset": None}, {"scale": None}):
        other = replace(code, **changed)
        assert_close([sae.decode_difference(other, code)], [sae.decode(other) - sae.decode(code)])
        assert_close([sae.decode_difference(code, other)], [sae.decode(code) - sae.decode(other)])


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
