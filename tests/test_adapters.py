"""Recommenders of other libraries: their own scores come out, and an SAE in them works as in ours."""

import copy

import pytest
import torch
from recommender_contract import CLOSE, check_recommender
from torch import nn

from sae_kernels.data.histories import Histories
from sae_kernels.hooks import record
from sae_kernels.recommenders import ELSA, MultVAE, SASRec
from sae_kernels.recommenders.adapters import (
    CollaborativeAdapter,
    SequenceAdapter,
    from_recbole,
    from_rectools,
    from_transformers,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LISTS = [[3, 0, 4, 9], [], [1, 2, 3, 4, 0, 5, 6, 7, 8, 10, 11], [2]]
N, LENGTH = 12, 6


@pytest.fixture
def histories():
    return Histories.from_lists(LISTS, N)


class Recurrent(nn.Module):
    """tokens [B, T] -> scores [B, T, vocabulary]."""

    def __init__(self, vocabulary=N + 2, d=8):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d)
        self.cell = nn.GRU(d, d, batch_first=True)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocabulary)

    def forward(self, tokens):
        return self.head(self.norm(self.cell(self.embedding(tokens))[0]))


def made(kind):
    torch.manual_seed(0)
    if kind == "collaborative":
        return CollaborativeAdapter(nn.Sequential(nn.Linear(N, 8), nn.Tanh(), nn.Linear(8, N)), "1", N)
    if kind == "left":
        return SequenceAdapter(Recurrent(), "norm", N, max_len=LENGTH)
    if kind == "right":
        return SequenceAdapter(Recurrent(), "norm", N, max_len=LENGTH, padding="right")
    if kind == "mask":
        return SequenceAdapter(Recurrent(), "norm", N, max_len=LENGTH, padding="right", mask_token=N + 1)
    transformers = pytest.importorskip("transformers", reason="Hugging Face transformers is absent")
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=N + 1, n_positions=LENGTH, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        return from_transformers(transformers.GPT2LMHeadModel(config), N)
    config = transformers.BertConfig(
        vocab_size=N + 2, max_position_embeddings=LENGTH, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    return from_transformers(transformers.BertForMaskedLM(config), N, mask_token=N + 1)


KINDS = ("collaborative", "left", "right", "mask", "gpt2", "bert")
SEQUENCES = KINDS[1:]


# --- what every adapter does ---


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_a_recommender(kind, histories):
    model = made(kind)
    assert (model.n_items, model.d) == (N, 8) and not model.training
    check_recommender(model, histories)


@pytest.mark.parametrize("kind", SEQUENCES)
def test_only_real_positions_are_recorded(kind, histories):
    model = made(kind)
    with record(model, model.hook_point, mask=model.mask) as rec, torch.no_grad():
        model(model.inputs(*histories.bags()))
    room = LENGTH - (model.mask_token is not None)
    kept = sum(min(length, room) + (model.mask_token is not None) for length in histories.lengths.tolist())
    assert rec.activations.shape == (kept, 8)


@pytest.mark.parametrize("kind", ["gpt2", "right", "collaborative"])
def test_copies_are_independent(kind, histories):
    model = made(kind)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert not torch.equal(twin.score_histories(*histories.bags()), model.score_histories(*histories.bags()))
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        twin.score_histories(*histories.bags()), model.score_histories(*histories.bags()), rtol=0, atol=0
    )


def test_the_inputs_by_hand(histories):
    rows = histories.bags(torch.tensor([0, 1, 2]))
    assert made("left").inputs(*rows).tolist() == [[0, 0, 4, 1, 5, 10], [0] * 6, [6, 7, 8, 9, 11, 12]]
    assert made("right").inputs(*rows).tolist() == [[4, 1, 5, 10, 0, 0], [0] * 6, [6, 7, 8, 9, 11, 12]]
    assert made("mask").inputs(*rows).tolist() == [
        [4, 1, 5, 10, 13, 0], [13, 0, 0, 0, 0, 0], [7, 8, 9, 11, 12, 13],
    ]  # fmt: skip
    torch.manual_seed(0)
    tokens = torch.arange(N).flip(0) + 1
    left = SequenceAdapter(Recurrent(), "norm", N, max_len=4, pad_token=13, mask_token=0, tokens=tokens)
    assert left.inputs(*rows).tolist() == [[12, 8, 3, 0], [13, 13, 13, 0], [4, 2, 1, 0]]
    net = Recurrent.forward(left.model, torch.tensor([[12, 8, 3, 0]]))[0, -1]
    torch.testing.assert_close(left.score_histories(*histories.bags(torch.tensor([0])))[0], net[tokens], **CLOSE)
    collaborative = made("collaborative")
    assert torch.equal(collaborative.inputs(*rows), histories.batch(torch.tensor([0, 1, 2])))


def test_a_model_with_scores_of_the_last_position_alone(histories):
    class Last(Recurrent):
        def forward(self, tokens):
            return super().forward(tokens)[:, -1]

    whole, last = made("left"), SequenceAdapter(Last(), "norm", N, max_len=LENGTH)
    last.load_state_dict(whole.state_dict())
    bags = histories.select(torch.tensor([0, 2, 3])).bags()
    torch.testing.assert_close(last.score_histories(*bags), whole.score_histories(*bags), **CLOSE)


def test_item_ids():
    torch.manual_seed(0)
    names = [f"book {i}" for i in range(N)]
    model = CollaborativeAdapter(nn.Sequential(nn.Linear(N, 8), nn.Linear(8, N)), "0", N, item_ids=names)
    assert model.codes(["book 3", "book 0"]).tolist() == [3, 0]
    with pytest.raises(ValueError, match=r"does not know 2 of 3 item ids: \['film', 'book 99'\]"):
        model.codes(["film", "book 1", "book 99"])
    with pytest.raises(ValueError, match="item_ids names 3 items, the model has 12"):
        CollaborativeAdapter(nn.Sequential(nn.Linear(N, 8), nn.Linear(8, N)), "0", N, item_ids=names[:3])


def test_a_module_that_is_not_the_bottleneck_is_said_so():
    net = nn.Sequential(nn.Linear(N, 8), nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.Linear(8, N))
    with pytest.raises(ValueError, match=r"'model.1' is not the bottleneck.*puts out \(2, 2, 4\), expected \[B, d\]"):
        CollaborativeAdapter(net, "1", N)
    with pytest.raises(ValueError, match=r"'model.3' is not the bottleneck: its output \(2, 12\) is as wide as the it"):
        CollaborativeAdapter(net, "3", N)
    with pytest.raises(ValueError, match=r"no module 'model.7'"):
        CollaborativeAdapter(net, "7", N)
    with pytest.raises(ValueError, match="scores must be"):
        CollaborativeAdapter(nn.Sequential(nn.Linear(N, 8), nn.Linear(8, 5)), "0", N)

    class Last(nn.Module):
        def forward(self, x):
            return x[:, -1]

    class Unused(Recurrent):
        def __init__(self):
            super().__init__()
            self.spare, self.last = nn.Linear(8, 8), Last()

        def forward(self, tokens):
            return self.head(self.last(self.norm(self.cell(self.embedding(tokens))[0])))

    with pytest.raises(ValueError, match=r"'model.last' is not the bottleneck.*\(2, 8\), expected \[B, T, d\]"):
        SequenceAdapter(Unused(), "last", N, max_len=LENGTH)
    with pytest.raises(ValueError, match=r"'model.spare' did not run"):
        SequenceAdapter(Unused(), "spare", N, max_len=LENGTH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_len": 0}, "max_len must be an int of at least 1, got 0"),
        ({"max_len": 1, "mask_token": 13}, "at least 2, got 1"),
        ({"padding": "both"}, "padding must be 'left' or 'right', got 'both'"),
        ({"tokens": torch.zeros(N, dtype=torch.int64)}, "distinct"),
        ({"tokens": torch.arange(3)}, r"tokens must be int64 \[n_items = 12\], got torch.int64 \(3,\)"),
        ({"pad_token": 5}, "pad_token 5 and mask_token None must differ and be no item's token"),
        ({"mask_token": 0}, "must differ"),
        ({"tokens": torch.arange(N) + 5, "pad_token": 1}, "index out of range|column for token 16"),
    ],
)
def test_bad_layouts(options, message):
    with pytest.raises((ValueError, IndexError), match=message):
        SequenceAdapter(Recurrent(), "norm", N, **{"max_len": LENGTH, **options})
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        SequenceAdapter("model", "norm", N, max_len=LENGTH)
    with pytest.raises(ValueError, match="n_items must be at least 2, got 1"):
        CollaborativeAdapter(nn.Linear(1, 1), "", 1)


def test_our_own_recommenders_have_the_same_attributes(histories):
    torch.manual_seed(0)
    for model in (ELSA(N, 8).eval(), MultVAE(N, 8, hidden=9).eval(), SASRec(N, 8, max_len=LENGTH).eval()):
        bags = histories.select(torch.tensor([0, 2, 3])).bags()
        with record(model, model.hook_point, positions=model.positions, mask=model.mask) as rec, torch.no_grad():
            model(model.inputs(*bags))
        torch.testing.assert_close(rec.activations, model.encode_histories(*bags), **CLOSE)


# --- Hugging Face transformers ---


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_transformers_scores_are_the_models_own(kind, histories):
    model = made(kind)
    for row in (0, 2, 3):
        items = [item + 1 for item in LISTS[row]]
        tokens = items[-LENGTH:] if kind == "gpt2" else [*items[-LENGTH + 1 :], N + 1]
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([tokens])).logits[0, -1, 1 : N + 1]
            found = model.score_histories(*histories.bags(torch.tensor([row])))[0]
        torch.testing.assert_close(found, logits, **CLOSE)


def test_transformers_layouts_that_do_not_fit():
    model = made("gpt2").model
    with pytest.raises(ValueError, match="20 items with tokens up to 20, pad_token 0 and mask_token None do not fit"):
        from_transformers(model, 20)
    with pytest.raises(ValueError, match="max_len must be given, and at most 6 positions; got 9"):
        from_transformers(model, N, max_len=9)
    with pytest.raises(TypeError, match="GPT2Model has no language-modelling head"):
        from_transformers(model.transformer, N)
    with pytest.raises(ValueError, match=r"'model.lm_head' is not the bottleneck.*puts out \(2, 13\), expected"):
        from_transformers(model, N, hook_point="lm_head")
    early = from_transformers(model, N, hook_point="transformer.h.0")
    assert early.hook_point == "model.transformer.h.0"
    with pytest.raises(ValueError, match="how items are scored from 'model.transformer.h.0' is not known"):
        early.item_head()


def test_not_a_recbole_model():
    with pytest.raises(TypeError, match="Linear is neither a sequential recommender nor an autoencoder"):
        from_recbole(nn.Linear(3, 3))


def test_not_a_rectools_model():
    with pytest.raises(TypeError, match="Linear is not a transformer model of RecTools"):
        from_rectools(nn.Linear(3, 3))
