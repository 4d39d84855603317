"""Dense, plain oracles of TopKSAE, and small modules to hold against them."""

from pathlib import Path

import torch

from sae_kernels.nn import TopKSAE

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
