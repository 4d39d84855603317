"""TopKSAE as a module: constraint, initialisation, state, compile, export, autocast, DDP, bad input."""

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from sae_oracle import assert_close, gradients, make, rows
from torch import nn

from sae_kernels.nn import NORMALIZERS, SparseCode, TopKSAE

SHARED = Path(__file__).parents[2] / "shared" / "data"
EPS = torch.finfo(torch.float32).eps


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


def test_constrain_leaves_a_frozen_decoder():
    sae = TopKSAE(6, 12, 2)
    with torch.no_grad():
        sae.W_dec.mul_(3)
    sae.W_dec.requires_grad_(False)
    before = sae.W_dec.clone()
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.1)
    with sae.constrain(optimizer):
        sae.loss(torch.randn(9, 6)).loss.backward()
        optimizer.step()
    assert torch.equal(sae.W_dec, before)


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
        assert_close([ours.fvu, ours.aux, ours.code.to_dense()], [theirs.fvu, theirs.aux, theirs.code.to_dense()], 1e-5)
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
