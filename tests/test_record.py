"""record on modules of several kinds: what is stored, and what names and picks are refused."""

import pytest
import torch
from hooked_models import RETURNS, D, Sequence, Wrapped, hooks_of, make_sae, padded_ids
from torch import nn

from sae_kernels.hooks import attach, record


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
