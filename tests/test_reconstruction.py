"""Reconstruction metrics against dense float64 oracles, and their independence of the batch split."""

import math

import pytest
import torch

from sae_kernels.eval.reconstruction import ReconstructionMetrics, evaluate_reconstruction, reconstruction_metrics
from sae_kernels.nn.sae import TopKSAE

D_IN, D_SAE, K = 12, 40, 5


def sample(rows=257, offset=100.0, seed=0):
    """Rows far from the origin: a one-pass sum of squares would lose the variance."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, D_IN, generator=g, dtype=torch.float64) + offset
    x_hat = x + 0.3 * torch.randn(rows, D_IN, generator=g, dtype=torch.float64)
    values = torch.relu(torch.randn(rows, K, generator=g, dtype=torch.float64))
    indices = torch.stack([torch.randperm(D_SAE - 7, generator=g)[:K] for _ in range(rows)]).to(torch.int32)
    return x, x_hat, values, indices


def oracle(x, x_hat, values, indices):
    dense = torch.zeros(len(x), D_SAE, dtype=torch.float64).scatter_(1, indices.long(), values)
    return {
        "fvu": ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item(),
        "mse": (x - x_hat).square().mean().item(),
        "cosine": torch.cosine_similarity(x, x_hat, dim=1).mean().item(),
        "l0": (dense != 0).sum(1).double().mean().item(),
        "dead_share": (~(dense != 0).any(0)).double().mean().item(),
        "rows": len(x),
    }


@pytest.mark.parametrize("split", [[257], [1] * 257, [100, 0, 57, 100], [256, 1]])
def test_against_the_oracle_whatever_the_split(split):
    data = sample()
    metrics = ReconstructionMetrics(D_IN, D_SAE)
    for part in zip(*(t.split(split) for t in data), strict=True):
        metrics.update(*part)
    found, expected = metrics.compute(), oracle(*data)
    for name, value in expected.items():
        # a variance of 1 at an offset of 100: 1e4 * eps is the rounding of the oracle itself
        assert found[name] == pytest.approx(value, rel=1e-11, abs=1e-12), name


def test_splits_agree_within_1e_12():
    data = sample(offset=1.0)
    figures = []
    for size in (1, 13, 257):
        metrics = ReconstructionMetrics(D_IN, D_SAE)
        for part in zip(*(t.split(size) for t in data), strict=True):
            metrics.update(*part)
        figures.append(metrics.compute())
    for name in figures[0]:
        assert figures[1][name] == pytest.approx(figures[0][name], rel=1e-12)
        assert figures[2][name] == pytest.approx(figures[0][name], rel=1e-12)


def test_hand_computed():
    x = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    x_hat = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 0.0], [1.0, 0.0]])
    values = torch.tensor([[1.0, 0.0], [2.0, -1.0], [0.0, 0.0], [0.0, 0.0]])
    indices = torch.tensor([[0, 1], [2, 0], [0, 1], [1, 2]])
    metrics = ReconstructionMetrics(2, 4)
    metrics.update(x, x_hat, values, indices)
    found = metrics.compute()
    # error 1 + 8 + 0 + 1; mean (0.5, 0.5), deviations 2.5 + 2.5 + 0.5 + 0.5; cosines 1, 0, 1 (both zero), 0 (one zero)
    assert found == pytest.approx(
        {"fvu": 10 / 6, "mse": 10 / 8, "cosine": 0.5, "l0": 0.75, "dead_share": 0.5, "rows": 4}
    )
    assert metrics.counts.tolist() == [2, 0, 1, 0]


def test_merge_equals_one_pass():
    data = sample()
    whole = ReconstructionMetrics(D_IN, D_SAE)
    whole.update(*data)
    left, right, empty = (ReconstructionMetrics(D_IN, D_SAE) for _ in range(3))
    left.update(*(t[:50] for t in data))
    right.update(*(t[50:] for t in data))
    assert left.merge(right).merge(empty).compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert torch.equal(left.counts, whole.counts)
    with pytest.raises(ValueError, match=r"cannot merge metrics of d_in, d_sae = 12, 41 into 12, 40"):
        left.merge(ReconstructionMetrics(D_IN, 41))


def test_mask_and_leading_dimensions():
    x, x_hat, values, indices = sample(60)
    mask = torch.arange(60) % 3 != 0
    kept, masked = ReconstructionMetrics(D_IN, D_SAE), ReconstructionMetrics(D_IN, D_SAE)
    kept.update(x[mask], x_hat[mask], values[mask], indices[mask])
    masked.update(*(t.reshape(6, 10, -1) for t in (x, x_hat, values, indices)), mask=mask.reshape(6, 10))
    assert masked.compute() == kept.compute()
    assert masked.compute()["rows"] == 40


def test_no_variance_and_nan():
    values, indices = torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int32)
    same = torch.full((3, 2), 5.0)
    perfect, wrong, nan = (ReconstructionMetrics(2, 4) for _ in range(3))
    perfect.update(same, same, values, indices)
    wrong.update(same, same + 1, values, indices)
    nan.update(same, same * float("nan"), values, indices)
    assert perfect.compute()["fvu"] == 0
    assert wrong.compute()["fvu"] == math.inf
    assert math.isnan(nan.compute()["cosine"]) and math.isnan(nan.compute()["mse"])


def test_bad_input():
    metrics = ReconstructionMetrics(D_IN, D_SAE)
    x, x_hat, values, indices = sample(4)
    with pytest.raises(ValueError, match="no rows were seen"):
        metrics.compute()
    with pytest.raises(ValueError, match=r"x \(4, 12\) and x_hat \(4, 11\)"):
        metrics.update(x, x_hat[:, 1:], values, indices)
    with pytest.raises(ValueError, match=r"do not go with x \(4, 12\)"):
        metrics.update(x, x_hat, values[:3], indices[:3])
    with pytest.raises(ValueError, match="mask must be bool with one entry per row"):
        metrics.update(x, x_hat, values, indices, mask=torch.ones(4))
    with pytest.raises(ValueError, match=r"indices must be in \[0, 40\)"):
        metrics.update(x, x_hat, values + 1, indices + 40)
    assert metrics.rows == 0 and metrics.counts.sum() == 0


def test_of_a_module():
    torch.manual_seed(0)
    sae = TopKSAE(D_IN, D_SAE, K, normalize="standardize").train()
    x = torch.randn(90, D_IN)
    seen = []
    found = reconstruction_metrics(
        sae, x.reshape(9, 10, D_IN), batch_size=32, each=lambda v, i: seen.append((v, i))
    ).compute()
    assert sae.training, "the mode is put back"
    code = sae.encode(x)
    expected = oracle(x.double(), sae.decode(code).detach().double(), code.values.detach().double(), code.indices)
    assert found == pytest.approx(expected, rel=1e-5)
    assert sum(len(v) for v, _ in seen) == 90
    assert evaluate_reconstruction(sae, iter([x[:40], x[40:]])) == pytest.approx(found, rel=1e-6)
    with pytest.raises(ValueError, match=r"source gave \(3, 11\); the SAE takes \[..., 12\]"):
        evaluate_reconstruction(sae, torch.zeros(3, 11))
