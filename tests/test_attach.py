"""attach on modules of several kinds: what changes, and what must stay bit for bit."""

import pytest
import torch
from hooked_models import RETURNS, TAKES, D, Sequence, Wrapped, amplify, hooks_of, make_sae, padded_ids
from torch import nn
from torch.utils.checkpoint import checkpoint

from sae_kernels.hooks import attach, record


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (0, 8)])
@pytest.mark.parametrize("kind", RETURNS)
def test_attach_replaces_the_tensor_and_leaves_the_rest(kind, shape):
    model, sae, x = Wrapped(kind), make_sae(), torch.randn(*shape)
    plain = model(x)
    before = hooks_of(model)
    handle = attach(model, "block", sae)
    out = model(x)
    hidden = model.block.linear(x)
    torch.testing.assert_close(out, model.head(sae(hidden)))
    assert type(model.last) is type(RETURNS[kind](hidden, hidden))
    if kind == "dataclass":
        assert model.last.loss == 0.5 and torch.equal(model.last.other, 2 * hidden)
    elif kind in ("dict", "model_output"):
        assert list(model.last) == list(RETURNS[kind](hidden, hidden))
        assert torch.equal(model.last["other"], 2 * hidden)
    elif kind != "tensor":
        assert len(model.last) == 2 and torch.equal(model.last[1], 2 * hidden)
    assert torch.equal(handle.code.to_dense(), sae.encode(hidden).to_dense()) and not handle.code.values.requires_grad
    handle.remove()
    handle.remove()
    assert torch.equal(model(x), plain) and hooks_of(model) == before
    assert not any("sae" in name for name in model.state_dict())


def test_attach_output_index_and_key():
    x, sae = torch.randn(5, 8), make_sae()
    for kind, options in (("tuple", {"output_index": 1}), ("dataclass", {"output_key": "other"})):
        model = Wrapped(kind)
        with attach(model, "block", sae, **options):
            model(x)
        hidden = model.block.linear(x)
        other = model.last[1] if kind == "tuple" else model.last.other
        assert torch.equal(TAKES[kind](model.last), hidden)
        torch.testing.assert_close(other, sae(2 * hidden))


def test_edit_and_error_term():
    model, sae, x = nn.Sequential(nn.Linear(8, D)), make_sae(), torch.randn(5, 8)
    plain = model(x)
    code = sae.encode(plain)
    with attach(model, "0", sae, edit=amplify) as handle:
        torch.testing.assert_close(model(x), sae.decode(amplify(code)))
        assert torch.equal(handle.code.values, code.values)
        handle.edit = None
        torch.testing.assert_close(model(x), sae(plain))
        handle.error_term = True
        assert torch.equal(model(x), plain)
        handle.edit = lambda c: c.replace(values=c.values * 1)
        assert torch.equal(model(x), plain)
        handle.edit = amplify
        torch.testing.assert_close(model(x), plain + sae.decode(amplify(code)) - sae.decode(code))
        handle.edit = lambda c: c.values
        with pytest.raises(TypeError, match="edit must return a SparseCode, got Tensor"):
            model(x)
    assert torch.equal(model(x), plain)


def test_error_term_changes_only_what_the_edit_changes():
    model, sae, x = nn.Sequential(nn.Linear(8, D)), make_sae(), torch.randn(6, 8)
    plain = model(x)

    def edit(code):
        values = code.values.clone()
        values[2, 0] += 1.0
        return code.replace(values=values)

    with attach(model, "0", sae, edit=edit, error_term=True):
        out = model(x)
    code = sae.encode(plain)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(out[others], plain[others])
    moved = sae.W_dec[code.indices[2, 0].long()] * code.scale[2]
    torch.testing.assert_close(out[2] - plain[2], moved, rtol=1e-4, atol=1e-5)


def test_error_term_in_bfloat16_keeps_the_output():
    model, sae, x = nn.Sequential(nn.Linear(8, D)).bfloat16(), make_sae(), torch.randn(5, 8).bfloat16()
    plain = model(x)
    assert plain.dtype == torch.bfloat16
    with attach(model, "0", sae, error_term=True, edit=lambda c: c.replace(values=c.values * 1.0001)):
        # an edit far below the rounding of bfloat16; decoding twice in bfloat16 would disturb most entries
        assert (model(x) != plain).float().mean() < 0.05
    with attach(model, "0", sae) as handle:
        assert model(x).dtype == torch.bfloat16
        torch.testing.assert_close(model(x), sae(plain.float()).bfloat16())
        assert handle.code.values.dtype == torch.float32


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_padding_and_other_positions_stay_bit_for_bit(positions, left, error_term):
    model, sae, ids = nn.Sequential(nn.Embedding(50, D)), make_sae(), padded_ids(left)
    with torch.no_grad():
        model[0].weight[0] = float("nan")  # padding may hold anything
    ids = torch.cat([ids, torch.zeros(1, 7, dtype=torch.int64)])  # a sequence of padding alone
    real = ids != 0
    place = torch.arange(7)
    chosen = real if positions == "all" else real & (place == (real * place).amax(1, keepdim=True))
    plain = model(ids)
    options = {"mask": lambda ids: ids != 0, "positions": positions, "edit": amplify, "error_term": error_term}
    with attach(model, "0", sae, **options) as handle:
        out = model(ids)
    x = plain[chosen]
    expected = sae.decode(amplify(sae.encode(x))) + ((x - sae(x)) if error_term else 0)
    torch.testing.assert_close(out[chosen], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(out[~chosen].nan_to_num(7.0), plain[~chosen].nan_to_num(7.0))
    shape = (5, 7, 6) if positions == "all" else (5, 6)
    assert handle.code.values.shape == shape
    kept = real if positions == "all" else real.any(1)
    assert (handle.code.values[~kept] == 0).all() and (handle.code.values[kept] != 0).any(-1).all()


def test_last_without_a_mask_and_short_sequences():
    model, sae, x = nn.Sequential(nn.Linear(8, D)), make_sae(), torch.randn(3, 4, 8)
    plain = model(x)
    with attach(model, "0", sae, positions="last") as handle:
        out = model(x)
        assert model(x[:, :0]).shape == (3, 0, D)
        assert model(x[:, :1]).shape == (3, 1, D)
        with pytest.raises(ValueError, match="positions='last' needs"):
            model(x[0])
        handle.mask = torch.ones(3, 5)
        with pytest.raises(ValueError, match=r"mask \(3, 5\) must be \(3, 4\)"):
            model(x)
    assert torch.equal(out[:, :-1], plain[:, :-1])
    torch.testing.assert_close(out[:, -1], sae(plain[:, -1]))


def test_transformer_in_eval_mode_with_its_nested_tensors():
    model, sae, ids = Sequence().eval(), make_sae(), padded_ids()
    options = {"mask": lambda ids: ids != 0, "edit": amplify}
    real = ids != 0
    for positions in ("all", "last"):
        with attach(model, "encoder.layers.0", sae, positions=positions, **options):
            with torch.no_grad():
                fast = model(ids)
            slow = model(ids)
        torch.testing.assert_close(fast[real], slow[real], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(slow[real], model(ids)[real], rtol=1e-2)


def test_gradients_flow_through_a_frozen_and_an_unfrozen_sae():
    model, sae, x = nn.Sequential(nn.Linear(8, D), nn.Linear(D, 3)), make_sae(), torch.randn(5, 8)
    hidden = model[0](x).detach().requires_grad_()
    model[1](sae(hidden)).square().sum().backward()
    expected = x.T @ hidden.grad
    decoder = sae.W_dec.grad.clone()
    for frozen in (True, False):
        sae.zero_grad()
        model.zero_grad()
        sae.requires_grad_(not frozen)
        with attach(model, "0", sae):
            model(x).square().sum().backward()
        torch.testing.assert_close(model[0].weight.grad, expected.T, rtol=1e-4, atol=1e-5)
        if frozen:
            assert sae.W_dec.grad is None
        else:
            torch.testing.assert_close(sae.W_dec.grad, decoder, rtol=1e-4, atol=1e-5)
    with attach(model, "0", sae, error_term=True, edit=amplify, mask=torch.arange(5) > 1):
        x_in = x.clone().requires_grad_()
        model(x_in).sum().backward()
    torch.testing.assert_close(x_in.grad[0], (model[1].weight @ model[0].weight).sum(0))
    assert torch.isfinite(x_in.grad).all() and not torch.allclose(x_in.grad[3], x_in.grad[0])


def test_code_in_the_graph_on_request():
    model, sae, x = nn.Sequential(nn.Linear(8, D)), make_sae(), torch.randn(5, 8)
    with attach(model, "0", sae, detach_code=False) as handle:
        model(x)
    handle.code.values.sum().backward()
    assert model[0].weight.grad.abs().sum() > 0


def test_two_modules_at_once_and_one_module_twice():
    model, x = nn.Sequential(nn.Linear(8, D), nn.Linear(D, 12)), torch.randn(5, 8)
    first, second = make_sae(), make_sae(12)
    plain = model(x)
    one, two = attach(model, "0", first), attach(model, "1", second)
    torch.testing.assert_close(model(x), second(model[1].forward(first(model[0].forward(x)))))
    with pytest.raises(ValueError, match="module '0' has an SAE already"):
        attach(model, "0", first)
    one.remove()
    torch.testing.assert_close(model(x), second(plain))
    with attach(model, "0", first):
        two.remove()
    assert torch.equal(model(x), plain)


def test_a_handle_is_entered_once():
    """A second `with` would run without the SAE, or take it out of the first."""
    model, sae, x = nn.Sequential(nn.Linear(8, D)), make_sae(), torch.randn(5, 8)
    plain, handle = model(x), attach(model, "0", sae)
    with handle:
        with pytest.raises(RuntimeError, match="attach '0': this handle was entered or removed already"):
            handle.__enter__()
        torch.testing.assert_close(model(x), sae(plain))
    removed = attach(model, "0", sae)
    removed.remove()
    for one in (handle, removed):
        with pytest.raises(RuntimeError, match="attach the SAE again"), one:
            pass
    assert torch.equal(model(x), plain)


def test_attach_and_record_together_and_exceptions():
    model, sae, x = nn.Sequential(nn.Linear(8, D), nn.Linear(D, 3)), make_sae(), torch.randn(5, 8)
    before = hooks_of(model)

    def broken(code):
        raise KeyError("in the edit")

    with pytest.raises(KeyError, match="in the edit"), attach(model, "0", sae, edit=broken):
        model(x)
    assert hooks_of(model) == before
    with attach(model, "0", sae), record(model, "0") as rec:
        model(x)
    torch.testing.assert_close(rec.activations, sae(model[0](x)).detach())


def test_attach_refuses_what_does_not_fit():
    model, x = nn.Sequential(nn.Linear(8, D)), torch.randn(5, 8)
    with pytest.raises(ValueError, match=r"\(5, 16\) must end in the SAE's d_in = 12 of W_enc \(64, 12\)"):
        with attach(model, "0", make_sae(12)):
            model(x)
    with pytest.raises(TypeError, match="sae must be a TopKSAE, got Linear"):
        attach(model, "0", nn.Linear(3, 3))
    with pytest.raises(ValueError, match="positions must be"):
        attach(model, "0", make_sae(), positions="first")
    assert hooks_of(model) == hooks_of(nn.Sequential(nn.Linear(8, D)))


def test_attached_before_torch_compile():
    model, sae, x = nn.Sequential(nn.Linear(8, D), nn.Linear(D, 3)), make_sae(), torch.randn(5, 8)
    torch._dynamo.reset()
    with attach(model, "0", sae) as handle:
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model[1](sae(model[0].forward(x))), rtol=1e-5, atol=1e-5)
        assert handle.code.values.shape == (5, 6)
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(D, D)

    def forward(self, x):
        return torch.relu(self.lin(x))


@pytest.mark.parametrize("use", [record, lambda model, name: attach(model, name, make_sae())])
@pytest.mark.parametrize("in_place", [True, False])
def test_modules_inside_a_compiled_one_are_refused(use, in_place):
    model = nn.Sequential(Block(), nn.Linear(D, 3))
    if in_place:
        model[0].compile(backend="eager")
    else:
        model[0] = torch.compile(model[0], backend="eager")
    inside = "0.lin" if in_place else "0._orig_mod.lin"
    with pytest.raises(ValueError, match=f"module '0', which '{inside}' is inside, is compiled"):
        use(model, inside)
    with record(model, "0") as rec, torch.no_grad():
        model(torch.randn(5, D))
    assert rec.activations.shape == (5, D)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_runs_modules_again(reentrant):
    """What is run again in backward is no new row, and its mask is still that of its own pass."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)), nn.Linear(D, 3)

        def forward(self, x):
            return self.head(checkpoint(self.inner, x, use_reentrant=reentrant))

    model, x, kept = Model(), torch.randn(64, D, requires_grad=True), torch.arange(64) % 3 > 0
    with record(model, "inner.0", mask=lambda x: kept) as rec:
        model(x).sum().backward()
    torch.testing.assert_close(rec.activations, model.inner[0](x)[kept].detach())
    sae, grads = make_sae(), []
    for again in (True, False):
        model.zero_grad()
        with attach(model, "inner.0", sae, mask=lambda x: kept):
            if not again:
                model.forward = lambda x: model.head(model.inner(x))
            model(x).sum().backward()
        grads.append(model.inner[0].weight.grad.clone())
    torch.testing.assert_close(*grads)
