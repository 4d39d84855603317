"""Models for the tests of hooks: what modules take and return in the wild, and a recommender in small."""

import collections
import dataclasses
import typing

import torch
from torch import nn

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
