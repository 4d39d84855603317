"""Small models, their inputs and a short extract() for the tests of extraction."""

import torch
from torch import nn

from sae_kernels.data.extract import extract

D, T = 8, 6


class Sequences(nn.Module):
    """ids [B, T], 0 for padding -> [B]; "encoder" puts out [B, T, D]; `after` counts what runs behind it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.encoder, self.head = nn.Embedding(30, D), nn.Linear(D, D), nn.Linear(D, 1)
        self.after, self.seen_training = 0, []

    def forward(self, ids, scale=None):
        self.seen_training.append(self.training)
        hidden = self.encoder(self.embed(ids) if scale is None else self.embed(ids) * scale)
        self.after += 1
        return self.head(hidden).sum((1, 2))


class Flat(nn.Sequential):
    """x [B, D] -> [B, D]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.extend([nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 3)])


def ids(n=50, seed=0):
    """Padded on the left, so that the mask matters."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 30, (n, T), generator=generator)
    x[torch.arange(T) < torch.randint(0, T, (n, 1), generator=generator)] = 0
    return x


def real(x, *_):
    return x != 0


def hidden(model, x, scale=1):
    with torch.no_grad():
        return model.encoder(model.embed(x) * scale)


def run(model, module, inputs, store, **options):
    return extract(model, module, inputs, store, **{"progress": False, "batch_size": 8, "shard_mb": 1e-3, **options})


def everything(store):
    return {name: store.read(slice(None), name) for name in store.fields}


def same(one, other):
    a, b = everything(one), everything(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
