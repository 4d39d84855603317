"""record and attach on modules of several kinds: what is stored, what changes, and what must stay bit for bit."""

import collections
import dataclasses
import typing

import pytest
import torch
from torch import nn

from sae_kernels.hooks import attach, record
from sae_kernels.nn import TopKSAE

D = 16


class Sequence(nn.Module):
    """Token ids, 0 for padding -> scores [B, T, 50]; a small transformer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, D)
        layer = nn.TransformerEncoderLayer(D, 2, 32, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(D, 50)

    def forward(self, ids):
        return self.out(self.encoder(self.embed(ids), src_key_padding_mask=ids == 0))


@dataclasses.dataclass(frozen=True)
class Result:
    loss: float
    hidden: torch.Tensor
    other: torch.Tensor


class ModelOutput(collections.OrderedDict):
    """A dict whose keys are attributes as well, as language model libraries return."""

    def __getattr__(self, name):
        return self[name]


class Pair(typing.NamedTuple):
    hidden: torch.Tensor
    other: torch.Tensor


RETURNS = {
    "tensor": lambda h, o: h,
    "tuple": lambda h, o: (h, o),
    "list": lambda h, o: [h, o],
    "namedtuple": lambda h, o: Pair(h, o),
    "dict": lambda h, o: {"note": "text", "hidden": h, "other": o},
    "model_output": lambda h, o: ModelOutput(hidden=h, other=o),
    "dataclass": lambda h, o: Result(0.5, h, o),
}
TAKES = {
    "tensor": lambda out: out,
    "tuple": lambda out: out[0],
    "list": lambda out: out[0],
    "namedtuple": lambda out: out.hidden,
    "dict": lambda out: out["hidden"],
    "model_output": lambda out: out.hidden,
    "dataclass": lambda out: out.hidden,
}


class Wrapped(nn.Module):
    """x -> block (an output of the given kind) -> head."""

    class Block(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind, self.linear = kind, nn.Linear(8, D)

        def forward(self, x):
            hidden = self.linear(x)
            return RETURNS[self.kind](hidden, 2 * hidden)

    def __init__(self, kind):
        super().__init__()
        self.block, self.head = Wrapped.Block(kind), nn.Linear(D, 3)

    def forward(self, x):
        self.last = self.block(x)
        return self.head(TAKES[self.block.kind](self.last))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_sae(d=D, **options):
    sae = TopKSAE(d, 64, 6, **{"normalize": "standardize", **options})
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.05)
        sae.b_dec.normal_(0, 0.1)
    return sae


def padded_ids(left=False):
    ids = torch.randint(1, 50, (4, 7))
    for row, length in enumerate((7, 5, 3, 1)):
        if left:
            ids[row, : 7 - length] = 0
        else:
            ids[row, length:] = 0
    return ids


def hooks_of(model):
    return [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]


def amplify(code):
    return code.replace(values=code.values * 3)


# record


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (0, 8)])
@pytest.mark.parametrize("kind", RETURNS)
def test_record_finds_the_tensor_in_any_output(kind, shape):
    model, x = Wrapped(kind), torch.randn(*shape)
    with record(model, "block") as rec:
        model(x)
        model(x + 1)
    expected = torch.cat([model.block.linear(x), model.block.linear(x + 1)]).reshape(-1, D)
    assert torch.equal(rec.activations, expected.detach())
    assert not rec.activations.requires_grad
    assert hooks_of(model) == hooks_of(Wrapped(kind))


@pytest.mark.parametrize("kind", ["tuple", "list", "namedtuple"])
def test_record_output_index(kind):
    model, x = Wrapped(kind), torch.randn(5, 8)
    for index in (1, -1):
        with record(model, "block", output_index=index) as rec:
            model(x)
        assert torch.equal(rec.activations, 2 * model.block.linear(x))


@pytest.mark.parametrize("kind", ["dict", "dataclass", "model_output"])
def test_record_output_key(kind):
    model, x = Wrapped(kind), torch.randn(5, 8)
    with record(model, "block", output_key="other") as rec:
        model(x)
    assert torch.equal(rec.activations, 2 * model.block.linear(x))


def test_record_several_modules_and_clear():
    model, x = nn.Sequential(nn.Linear(8, D), nn.ReLU(), nn.Linear(D, 3)), torch.randn(5, 8)
    with record(model, ["0", "2"]) as rec:
        model(x - 1)
        rec.clear()
        y = model(x)
    assert set(rec.activations) == {"0", "2"}
    assert torch.equal(rec.activations["0"], model[0](x)) and torch.equal(rec.activations["2"], y)


def test_record_keeps_what_a_later_operation_overwrites():
    model, x = nn.Sequential(nn.Linear(8, D), nn.ReLU(inplace=True)), torch.randn(5, 8)
    with record(model, "0") as rec:
        model(x)
    assert torch.equal(rec.activations, model[0](x)) and (rec.activations < 0).any()


def test_record_detach_and_to():
    model, x = nn.Sequential(nn.Linear(8, D)), torch.randn(5, 8)
    with record(model, "0", detach=False) as rec:
        model(x)
    rec.activations.sum().backward()
    assert torch.allclose(model[0].bias.grad, torch.full((D,), 5.0))
    with record(model, "0", to=torch.bfloat16) as rec:
        model(x)
    assert torch.equal(rec.activations, model[0](x).bfloat16())
    with record(model, "0", to="cpu") as rec:
        model(x)
    assert torch.equal(rec.activations, model[0](x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("left", [True, False])
def test_record_drops_padding_and_takes_the_last(left, training):
    model, ids = Sequence().train(training), padded_ids(left)
    real = ids != 0
    with torch.no_grad():
        with record(model, "encoder.layers.0") as rec:
            model(ids)
        everything = rec.activations
        with record(model, "encoder.layers.0", mask=lambda ids: ids != 0) as rec:
            model(ids)
        assert rec.activations.shape == (16, D)
        if len(everything) == 28:  # else eval mode made a nested tensor, which holds no padding
            torch.testing.assert_close(rec.activations, everything[real.reshape(-1)], rtol=1e-5, atol=1e-6)
        every = rec.activations
        with record(model, "encoder.layers.0", mask=lambda ids: ids != 0, positions="last") as rec:
            model(ids)
        ends = real.sum(1).cumsum(0) - 1
        torch.testing.assert_close(rec.activations, every[ends], rtol=1e-5, atol=1e-6)


def test_record_mask_tensor_set_before_each_pass():
    model, x = nn.Sequential(nn.Linear(8, D)), torch.randn(2, 3, 8)
    first, second = torch.rand(2, 3) > 0.5, torch.tensor([[1, 0, 0], [1, 1, 0]])
    with record(model, "0", mask=first) as rec:
        model(x)
        rec.mask = second
        model(x)
    hidden = model[0](x)
    assert torch.equal(rec.activations, torch.cat([hidden[first], hidden[second.bool()]]))


def test_record_last_without_a_mask_and_with_rows_of_padding():
    model, x = nn.Sequential(nn.Linear(8, D)), torch.randn(2, 3, 8)
    with record(model, "0", positions="last") as rec:
        model(x)
    torch.testing.assert_close(rec.activations, model[0](x)[:, -1].detach())
    with record(model, "0", positions="last", mask=torch.tensor([[0, 0, 0], [1, 1, 0]])) as rec:
        model(x)
    torch.testing.assert_close(rec.activations, model[0](x)[1:2, 1].detach())
    with record(model, "0", positions="last") as rec:
        model(x[:, :0])
    assert rec.activations.shape == (0, D)


def test_record_hooks_go_when_the_model_fails():
    model = Wrapped("tuple")
    before = hooks_of(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), record(model, "block"):
        model(torch.randn(5, 9))
    assert hooks_of(model) == before


def test_record_errors():
    model, x = Wrapped("tuple"), torch.randn(5, 8)
    with record(model, "head") as rec:
        model.block(x)
    with pytest.raises(RuntimeError, match="module 'head' never ran"):
        _ = rec.activations
    with pytest.raises(ValueError, match="positions must be 'all' or 'last', got 'first'"):
        record(model, "head", positions="first")
    with pytest.raises(ValueError, match="names is empty"):
        record(model, [])
    with pytest.raises(ValueError, match=r"mask \(4,\) must be \(5,\), for the output is \(5, 16\)"):
        with record(model, "block", mask=torch.ones(4)):
            model(x)
    with pytest.raises(ValueError, match=r"positions='last' needs an output \[B, T, d\], got \(5, 16\)"):
        with record(model, "block", positions="last"):
            model(x)
    with pytest.raises(TypeError, match="mask must be a tensor, a callable or None, got list"):
        with record(model, "block", mask=[1]):
            model(x)
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        with record(model, "block", mask=lambda x: [1]):
            model(x)
    with pytest.raises(RuntimeError, match="the model was not called"):
        with record(model, "block", mask=lambda x: x[:, 0] > 0):
            model.block(x)
    with pytest.raises(RuntimeError, match="already running"):
        with record(model, "block") as rec, rec:
            model(x)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("tuple", {"output_index": 2}, "no tensor at 2: the output is a tuple of 0: Tensor, 1: Tensor"),
        ("dict", {"output_key": "note"}, "no tensor at 'note': the output is a dict of note: str, hidden: Tensor"),
        ("dict", {"output_index": 0}, "output_index = 0 needs a tuple or list, the output is a dict"),
        ("tensor", {"output_key": "a"}, "output_key = 'a' needs a dict or dataclass, the output is a Tensor"),
    ],
)
def test_a_wrong_pick_says_what_is_there(kind, options, message):
    for use in (lambda m: record(m, "block", **options), lambda m: attach(m, "block", make_sae(), **options)):
        model = Wrapped(kind)
        with pytest.raises((TypeError, ValueError), match=message), use(model):
            model(torch.randn(5, 8))


def test_outputs_without_a_tensor():
    class Odd(nn.Module):
        def forward(self, x):
            return x

    model = nn.Sequential(Odd())
    for value, message in (("text", "the output is a str; expected"), ((1, "a"), "tuple without a tensor: 0: int")):
        with pytest.raises(TypeError, match=message), record(model, "0"):
            model(value)
    with pytest.raises(TypeError, match="floating tensor"), record(model, "0"):
        model(torch.ones(3, 4, dtype=torch.int64))


@pytest.mark.parametrize("use", [record, lambda model, name: attach(model, name, make_sae())])
def test_wrong_names_list_the_nearest(use):
    model = Sequence()
    before = hooks_of(model)
    with pytest.raises(ValueError, match=r"Sequence has no module 'encoder.layer.1'; nearest: .*'encoder.layers.1'"):
        use(model, "encoder.layer.1")
    with pytest.raises(ValueError, match="nearest: .*'encoder.layers.0.linear2'"):
        use(model, "linear2")
    with pytest.raises(ValueError, match="it has: 'embed', 'encoder'"):
        use(model, "zzz")
    with pytest.raises(ValueError, match="'' is the whole model; name one of its modules: 'embed'"):
        use(model, "")
    with pytest.raises(TypeError, match="name must be a str, got int"):
        use(model, 3) if use is not record else use(model, [3])
    with pytest.raises(TypeError, match="model must be an nn.Module, got function"):
        use(lambda x: x, "encoder")
    with pytest.raises(ValueError, match="comes from torch.compile"):
        use(torch.compile(model, backend="eager"), "encoder")
    assert hooks_of(model) == before


# attach


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
