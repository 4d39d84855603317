"""BatchTopKSAE and JumpReLUSAE against dense oracles in float64, and as drop-ins for a TopKSAE."""

import copy
import pickle

import pytest
import torch
from sae_oracle import assert_close, gradients, rows
from torch import nn

import sae_kernels as sk
from sae_kernels.nn import VARIANTS, BatchTopKSAE, JumpReLUSAE, TopKSAE
from sae_kernels.train import fit, load_sae, save_sae

BOTH = [BatchTopKSAE, JumpReLUSAE]


def make(cls, normalize="standardize", dtype=torch.float64, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    sae = cls(12, 40, 5, normalize=normalize, dtype=dtype, generator=generator, **options)
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1, generator=generator)
        sae.b_dec.normal_(0, 0.3, generator=generator)
    return sae


def standardized(x):
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0)


def fvu(y, x):
    return (y - x).square().sum() / (x - x.mean(0)).square().sum()


def pre_activations(sae, x):
    return (standardized(x) - sae.b_dec) @ sae.W_enc.T + sae.b_enc


def test_batch_topk_loss_is_the_dense_one():
    sae, x = make(BatchTopKSAE, max_active=40), rows(50)
    out = sae.loss(x)
    pre = pre_activations(sae, x).relu()
    code = torch.where(pre >= pre.flatten().topk(5 * 50).values[-1], pre, 0)
    dense = fvu(code @ sae.W_dec + sae.b_dec, standardized(x))
    assert_close([out.fvu, out.code.to_dense()], [dense, code])
    assert_close(gradients(sae, out.loss), gradients(sae, dense))
    assert out.l0 == 5 and out.code.values.shape == (50, 40)
    assert (out.code.values != 0).sum(-1).unique().numel() > 3
    narrow = make(BatchTopKSAE, max_active=5).loss(x).code  # no more than 5 in a row: a TopKSAE's code
    topk = sk.TopKSAE(12, 40, 5, normalize="standardize", dtype=torch.float64)
    topk.load_state_dict({**topk.state_dict(), **{n: p.detach() for n, p in sae.named_parameters()}})
    assert_close([narrow.to_dense()], [topk.loss(x).code.to_dense()])


def test_the_threshold_is_a_running_mean_and_encode_goes_by_it():
    sae, seen = make(BatchTopKSAE), []
    for seed in range(3):
        code = sae.loss(rows(60, seed=seed)).code.values
        seen.append(code[code > 0].min())
        assert_close([sae.threshold], [torch.stack(seen).mean()])
    for _ in range(2):  # neither the mode nor the neighbours decide about a row
        x = rows(30, seed=7)
        pre = pre_activations(sae, x)
        want = torch.where(pre > sae.threshold, pre, 0)
        assert_close([sae.encode(x).to_dense(), sae.encode(x[4]).to_dense()], [want, want[4]])
        before = sae.eval().threshold.clone()
        assert_close([sae.loss(x).code.to_dense()], [want])
        assert torch.equal(sae.threshold, before) and sae.threshold_batches == 3
    sae.train().threshold_batches.fill_(10**6)
    code = sae.loss(x).code.values
    assert_close([sae.threshold], [before + (code[code > 0].min() - before) / 100])


@pytest.mark.parametrize("cls", BOTH)
def test_rows_of_weight_0_count_nowhere(cls):
    x, keep = rows(60), torch.arange(60) % 3 > 0
    whole, part = make(cls), make(cls)
    poisoned = x.clone()
    poisoned[~keep] = torch.nan
    masked, alone = whole.loss(poisoned, keep), part.loss(x[keep])
    assert_close([t.double() for t in masked[:4]], [t.double() for t in alone[:4]])
    assert_close(gradients(whole, masked.loss), gradients(part, alone.loss))
    assert_close([masked.code.to_dense()[keep]], [alone.code.to_dense()])
    assert not masked.code.values[~keep].any()
    assert_close([whole.threshold.detach()], [part.threshold.detach()])


@pytest.mark.parametrize("cls", [BatchTopKSAE, JumpReLUSAE])
def test_a_batch_without_rows_moves_no_threshold(cls):
    x, sae = torch.randn(64, 12), make(cls).train()
    before = sae.threshold.clone()
    sae.loss(x[:0])
    sae.loss(x, torch.zeros(64))
    assert torch.equal(sae.threshold, before)
    sae.loss(x)
    first = sae.threshold.clone()
    assert not torch.equal(first, before)
    sae.loss(x, torch.zeros(64))
    assert torch.equal(sae.threshold, first)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cls", [TopKSAE, BatchTopKSAE, JumpReLUSAE])
def test_the_first_loss_compiles_as_one_graph(cls, weighted):
    x = rows(64)
    weight = (torch.arange(64) % 3).double() if weighted else None
    plain, compiled = make(cls).train(), make(cls).train()
    wanted = plain.loss(x, weight).loss
    got = torch.compile(compiled.loss, backend="eager", fullgraph=not weighted)(x, weight).loss
    torch.testing.assert_close(got, wanted)
    if cls is not TopKSAE:
        torch.testing.assert_close(compiled.threshold, plain.threshold)


def test_a_threshold_keeps_its_precision_beside_narrow_weights():
    """In bfloat16 the steps of a running mean would round to nothing."""
    x = torch.randn(2000, 12, generator=torch.Generator().manual_seed(0))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        sae = make(BatchTopKSAE, "none", dtype).train()
        assert sae.threshold.dtype == torch.float32
        for batch in (x * torch.linspace(3, 1, 2000).unsqueeze(1)).split(4):
            sae.loss(batch.to(dtype))
        found.append(sae.threshold.item())
    assert found[1] == pytest.approx(found[0], rel=0.05)
    exact = make(BatchTopKSAE, dtype=torch.float32)
    exact.threshold.fill_(1 / 3)
    value = exact.threshold.clone()
    assert torch.equal(exact.bfloat16().threshold, value) and exact.threshold.dtype == torch.float32
    assert exact.double().threshold.dtype == torch.float64 and exact.threshold == value
    empty = exact.to("meta").to_empty(device="cpu")
    assert empty.threshold.device.type == "cpu"


def test_jumprelu_starts_on_the_weights_themselves_when_losses_are_computed_in_bfloat16():
    x = 100 * torch.randn(1000, 12, generator=torch.Generator().manual_seed(0))
    thresholds = []
    for compute in (None, torch.bfloat16):
        sae = make(JumpReLUSAE, "none", torch.float32)
        fit(sae, x, steps=1, lr=1e-9, compute_dtype=compute, progress=False)
        thresholds.append(sae.threshold.mean().item())
    assert thresholds[1] == pytest.approx(thresholds[0], rel=0.02) and thresholds[0] > 10


def test_jumprelu_loss_and_its_straight_through_gradient():
    """Against the formulas of the paper, written out dense."""
    sae, x = make(JumpReLUSAE, max_active=40, bandwidth=0.4, l0_coef=0.3), rows(200)
    sae.init_threshold(x)
    with torch.no_grad():
        sae.log_threshold.add_(0.2 * torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    out = sae.loss(x)
    theta, pre = sae.threshold.detach(), pre_activations(sae, x)
    code = torch.where(pre > theta, pre, 0)
    code.retain_grad()
    l0 = (pre > theta).sum() / 200.0
    dense = fvu(code @ sae.W_dec + sae.b_dec, standardized(x))
    assert_close(
        [out.fvu, out.l0.double(), out.loss], [dense, l0.double(), dense + 0.3 * (l0.double() / 5 - 1) ** 2], 1e-6
    )
    got = torch.autograd.grad(out.loss, [*sae.parameters()], retain_graph=True)
    dense.backward()
    width = 0.4 * theta
    near = (pre.detach() - theta).abs() < width / 2
    dl0 = 2 * 0.3 * (l0 / 5 - 1) / 5 / 200
    by_hand = -(near * (theta / width * code.grad + dl0 / width)).sum(0) * theta
    assert near.any(0).sum() > 30
    for (name, parameter), gradient in zip(sae.named_parameters(), got, strict=True):
        assert_close([gradient], [by_hand if name == "log_threshold" else parameter.grad], 1e-6)


@pytest.mark.parametrize("kind", [sk.TopKSAE, sk.BatchTopKSAE, sk.JumpReLUSAE])
def test_errors_name_the_class(kind):
    sae, name = kind(4, 8, 2), kind.__name__
    with pytest.raises(ValueError, match=rf"^{name}: x \(3, 5\) must end in d_in = 4"):
        sae.encode(torch.ones(3, 5))
    with pytest.raises(ValueError, match=rf"^{name}.loss: weight \(2,\) must have"):
        sae.loss(torch.ones(3, 4), torch.ones(2))
    with pytest.raises(ValueError, match=rf"^{name}: k must be between 1 and 8"):
        kind(4, 8, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_jumprelu_starts_at_the_scale_of_small_rows(dtype):
    """Thresholds that are far below the smallest number of float16."""
    sae = JumpReLUSAE(12, 40, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x = 1e-9 * rows(60).to(dtype)
    sae.init_threshold(x)
    assert float((sae.eval().encode(x).values != 0).sum(-1).double().mean()) == pytest.approx(5, abs=0.5)
    sae.init_threshold(torch.zeros_like(x))
    assert sae.threshold.isfinite().all() and sae.log_threshold.isfinite().all()


def test_jumprelu_starts_at_k_latents_per_row():
    sae, x = make(JumpReLUSAE), rows(300)
    assert not sae.started
    assert sae.loss(x).l0 == pytest.approx(5, abs=0.01) and sae.started
    theta = sae.threshold.detach().clone()
    assert theta.unique().numel() == 1
    sae.loss(3 * x + rows(300, seed=5))
    assert torch.equal(sae.threshold, theta)  # set once
    sae.eval()
    pre = pre_activations(sae, x)
    assert_close([sae.encode(x).to_dense()], [torch.where(pre > theta, pre, 0)])


@pytest.mark.parametrize("cls", BOTH)
def test_training_stays_near_k_and_explains_about_as_much_as_topk(cls, threads):
    """On sparse data, after a short run; what is learned works one row at a time afterwards."""
    threads(1)
    generator = torch.Generator().manual_seed(0)
    directions = nn.functional.normalize(torch.randn(60, 12, generator=generator), dim=1)
    strength = torch.rand(6000, 60, generator=generator) * (torch.rand(6000, 60, generator=generator) < 0.05)
    x = strength @ directions + 0.01 * torch.randn(6000, 12, generator=generator)
    left = {}
    for kind in (TopKSAE, cls):
        sae = kind(12, 96, 4, generator=torch.Generator().manual_seed(1))
        result = fit(sae, x, steps=250, batch_size=512, lr=4e-3, seed=0, progress=False)
        assert result.steps == 250
        out = sae.eval().loss(x)
        left[kind] = out.fvu.item()
    assert 2 < out.l0 < 6 and left[cls] < 1.8 * left[TopKSAE] and left[TopKSAE] < 0.3


@pytest.mark.parametrize("cls", BOTH)
def test_state_round_trips(cls, tmp_path):
    sae, x = make(cls, max_active=11), rows(40)
    for _ in range(2):
        sae.loss(x)
    expected = sae(x)
    save_sae(sae, tmp_path / "sae")
    other = cls(12, 40, 5, normalize="standardize", dtype=torch.float64, max_active=11)
    other.load_state_dict(sae.state_dict(), strict=True)
    for twin in (other, copy.deepcopy(sae), pickle.loads(pickle.dumps(sae)), load_sae(tmp_path / "sae")):
        assert type(twin) is cls and torch.equal(twin(x), expected) and twin.max_active == 11
        assert not isinstance(twin, JumpReLUSAE) or twin.started
    with pytest.raises(ValueError, match=r"max_active=11 \(here 20\)"):
        make(cls).load_state_dict(sae.state_dict())
    plain = make(TopKSAE)
    with pytest.raises((RuntimeError, ValueError), match="threshold"):
        plain.load_state_dict(sae.state_dict())
    with pytest.raises((RuntimeError, ValueError), match="variant=None|threshold"):
        make(cls).load_state_dict(plain.state_dict())


@pytest.mark.parametrize("cls", BOTH)
def test_a_run_resumes_bit_for_bit(cls, tmp_path, threads):
    threads(1)
    x = rows(200, dtype=torch.float32)
    settings = {"steps": 12, "batch_size": 32, "progress": False, "log_every": 4}

    def stop(row):
        if row["step"] == 8:
            raise InterruptedError

    def new():
        return cls(12, 40, 5, generator=torch.Generator().manual_seed(1))

    straight, first, again = new(), new(), new()
    fit(straight, x, **settings)
    with pytest.raises(InterruptedError):
        fit(first, x, checkpoint=tmp_path / "run", checkpoint_every=4, log=stop, **settings)
    fit(again, x, checkpoint=tmp_path / "run", resume=True, **settings)
    for name, value in straight.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_checkpoint_of_an_unknown_variant(tmp_path):
    save_sae(make(BatchTopKSAE), tmp_path / "sae")
    config = tmp_path / "sae" / "config.json"
    config.write_text(config.read_text().replace('"batch_topk"', '"gated"'))
    with pytest.raises(ValueError, match="variant 'gated' is unknown here; known are topk, batch_topk, jumprelu"):
        load_sae(tmp_path / "sae")
    assert list(VARIANTS) == ["topk", "batch_topk", "jumprelu"]


@pytest.mark.parametrize("cls", BOTH)
def test_drop_in(cls):
    """Hooks, leading dimensions, narrow input, autocast, compile, export, empty input."""
    sae = make(cls, dtype=torch.float32)
    sae.loss(rows(100, dtype=torch.float32))
    sae.eval()
    x = rows(24, dtype=torch.float32)
    y, code = sae(x), sae.encode(x)
    assert code.values.shape == (24, 20) and code.d_sae == 40
    torch.testing.assert_close(sae(x.view(2, 12, 12)), y.view(2, 12, 12))
    assert sae(x[:0]).shape == (0, 12) and sae(x.bfloat16()).dtype == torch.bfloat16
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with sk.attach(model, "0", sae):
        torch.testing.assert_close(model(x), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(sae(x), y, rtol=1e-2, atol=1e-2)
    exported = torch.export.export(sae, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    torch.testing.assert_close(exported(x[:9]), y[:9])
    sae.train()
    twin = copy.deepcopy(sae)
    compiled = torch.compile(twin.loss, fullgraph=True, backend="aot_eager")(x)
    eager = sae.loss(x)
    assert_close(compiled[:4], eager[:4], 1e-5)
    assert_close(gradients(twin, compiled.loss), gradients(sae, eager.loss), 1e-4)


def test_bad_input():
    for cls in BOTH:
        with pytest.raises(ValueError, match="max_active must be between 5 and 40, got 4"):
            cls(12, 40, 5, max_active=4)
        with pytest.raises(ValueError, match="must end in d_in = 12"):
            make(cls).loss(torch.ones(3, 11))
    for option, value in (("bandwidth", 0.0), ("bandwidth", 2.0), ("l0_coef", -1.0), ("l0_coef", float("nan"))):
        with pytest.raises(ValueError, match=f"{option} must be .* got {value}"):
            JumpReLUSAE(12, 40, 5, **{option: value})
    with pytest.raises(ValueError, match="has no activation to choose, got 'abs'"):
        JumpReLUSAE(12, 40, 5, activation="abs")
    with pytest.raises(ValueError, match=r"x \(3, 11\) must end in d_in = 12"):
        make(JumpReLUSAE).init_threshold(torch.ones(3, 11))
