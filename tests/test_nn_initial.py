"""Starting weights from data: what they are, which rows they come from, and that latents live by them."""

import pytest
import torch
from sae_oracle import assert_close, make, rows

from sae_kernels.nn import VARIANTS, TopKSAE
from sae_kernels.nn.initial import dictionary, encoder_scale


def centred(sae, x):
    normalized = sae.normalizer(x)[0]
    return normalized - normalized.mean(0)


@pytest.mark.parametrize("name", ["none", "standardize", "l2"])
def test_the_decoder_starts_as_directions_of_distinct_rows(name):
    sae, x = make(name), rows(400)
    sae.init_from_data(x, torch.Generator().manual_seed(1))
    assert_close([sae.b_dec.detach()], [sae.normalizer(x)[0].mean(0)])
    unit = torch.nn.functional.normalize(centred(sae, x), dim=1)
    cosine, row = (sae.W_dec.detach() @ unit.T).max(1)
    assert_close([cosine], [torch.ones_like(cosine)])
    assert row.unique().numel() == sae.d_sae
    assert not sae.b_enc.any()
    again, other = make(name), make(name)
    again.init_from_data(x, torch.Generator().manual_seed(1))
    other.init_from_data(x, torch.Generator().manual_seed(2))
    assert torch.equal(sae.W_dec, again.W_dec) and torch.equal(sae.W_enc, again.W_enc)
    assert not torch.equal(sae.W_dec, other.W_dec)


@pytest.mark.parametrize("activation", ["relu", "none", "abs"])
def test_no_other_scale_of_the_encoder_reconstructs_better(activation):
    sae, x = make("none", activation=activation), rows(300)
    sae.init_from_data(x)
    best = (sae(x) - x).square().sum()
    for factor in (0.98, 1.02):
        with torch.no_grad():
            sae.W_enc.mul_(factor)
            assert (sae(x) - x).square().sum() > best
            sae.W_enc.div_(factor)
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_dec)
    assert (sae(x) - x).square().sum() > 2 * best


def test_fewer_rows_than_latents_leave_random_directions():
    x = torch.cat([torch.zeros(3, 12), torch.eye(12)[:5] * 7])
    W = dictionary(x, 40, torch.Generator().manual_seed(0))
    torch.testing.assert_close(W.norm(dim=1), torch.ones(40))
    assert sorted(W[:5].argmax(1).tolist()) == list(range(5)) and W[:5].sum() == 5
    assert W[5:].unique(dim=0).shape[0] == 35


def test_rows_that_no_latent_reaches_leave_the_scale_at_one():
    assert encoder_scale(torch.zeros(4, 3), torch.eye(3), 1, "relu") == 1
    assert encoder_scale(-torch.eye(3), torch.eye(3), 1, "relu") == 1


def test_bad_samples_are_named():
    sae = TopKSAE(12, 40, 5)
    with pytest.raises(ValueError, match="no rows"):
        sae.init_from_data(torch.empty(0, 12))
    with pytest.raises(ValueError, match="must end in d_in"):
        sae.init_from_data(torch.ones(4, 11))
    before = sae.W_dec.clone()
    with pytest.raises(ValueError, match="NaN or Inf"):
        sae.init_from_data(torch.full((4, 12), torch.nan))
    assert torch.equal(sae.W_dec, before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_starts_from_data(variant):
    x = rows(500).float()
    sae = VARIANTS[variant](12, 40, 5)
    sae.init_from_data(x)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    assert torch.isfinite(sae.train().loss(x).loss)
