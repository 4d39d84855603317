"""What tells the inputs of one extraction from those of another, and inputs that are not what they seem."""

import json

import pytest
import torch
from extract_models import D, Flat, Sequences, ids, real, run, same
from test_extract import Table
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, SubsetRandomSampler

from sae_kernels.data.extract import CallableInputs, as_inputs

UNNAMED = {
    "loader": lambda x: DataLoader(Table(x), batch_size=8),
    "dataset": Table,
    "list": lambda x: list(x.split(8)),
    "iterator": lambda x: iter(x.split(8)),
}


@pytest.mark.parametrize("kind", UNNAMED)
def test_inputs_that_say_nothing_of_themselves_are_told_by_their_first_batch(tmp_path, kind):
    make, x, more = UNNAMED[kind], ids(), ids(seed=5)
    first = run(Sequences(), "encoder", make(x), tmp_path / "s", mask=real)
    with pytest.raises(ValueError, match="holds other inputs.*first_batch is .* append=True adds these"):
        run(Sequences(), "encoder", make(more), tmp_path / "s", mask=real)
    for different in ({"mask": lambda x: x > 9}, {"mask": real, "prepare": lambda x: x.flip(1)}):
        with pytest.raises(ValueError, match="first_batch"):
            run(Sequences(), "encoder", make(x), tmp_path / "s", **different)
    assert same(run(Sequences(), "encoder", make(x), tmp_path / "s", mask=real), first)
    both = run(Sequences(), "encoder", make(more), tmp_path / "s", mask=real, append=True)
    assert both.rows == int(real(x).sum() + real(more).sum())


def test_a_cut_run_does_not_go_on_with_other_inputs(tmp_path):
    class Cut(Sequences):
        def forward(self, ids, scale=None):
            if len(self.seen_training) > 3:
                raise KeyboardInterrupt
            return super().forward(ids, scale)

    def loader(x):
        return DataLoader(Table(x), batch_size=8)

    with pytest.raises(KeyboardInterrupt):
        run(Cut(), "encoder", loader(ids()), tmp_path / "s", mask=real)
    with pytest.raises(ValueError, match="another one"):
        run(Sequences(), "encoder", loader(ids()), tmp_path / "s", mask=real)  # of another class
    Cut.forward = Sequences.forward
    with pytest.raises(ValueError, match="a run with other inputs is under way there: first_batch"):
        run(Cut(), "encoder", loader(ids(seed=5)), tmp_path / "s", mask=real)
    whole = run(Sequences(), "encoder", loader(ids()), tmp_path / "whole", mask=real)
    assert torch.equal(
        run(Cut(), "encoder", loader(ids()), tmp_path / "s", mask=real).read(slice(None)), whole.read(slice(None))
    )


def test_stores_from_before_first_batches_were_noted_are_opened(tmp_path):
    store = run(Flat(), "0", torch.randn(20, D), tmp_path / "s")
    path = tmp_path / "s" / "manifest.json"
    manifest = json.loads(path.read_text())
    x = torch.randn(20, D)
    assert manifest["inputs"][0].pop("first_batch")
    manifest["inputs"][0]["content"] = as_inputs(x, 8).describe()["content"]
    path.write_text(json.dumps(manifest))
    assert same(run(Flat(), "0", x, tmp_path / "s"), store)


def test_loaders_of_random_order_and_of_a_part(tmp_path):
    x = torch.randn(21, D)
    for sampler in (RandomSampler(x), SubsetRandomSampler(range(9))):
        for options in ({"sampler": sampler}, {"batch_sampler": BatchSampler(sampler, 4, False)}):
            with pytest.raises(ValueError, match="this DataLoader shuffles"):
                as_inputs(DataLoader(Table(x), **options))
    part = run(Flat(), "0", DataLoader(Table(x), batch_size=4, sampler=SequentialSampler(range(9))), tmp_path / "s")
    assert torch.equal(part.read(slice(None)), run(Flat(), "0", x[:9], tmp_path / "w", batch_size=4).read(slice(None)))


def test_wide_batches_after_a_narrow_first_one(tmp_path):
    """The inputs tell how wide they get, and shards stay below what was asked for."""
    lengths = torch.cat([torch.ones(8, dtype=torch.int64), torch.full((72,), 40)])

    def make(start, stop):
        return torch.where(torch.arange(int(lengths[start:stop].max())) < lengths[start:stop, None], 1, 0)

    sizes = {}
    for widest in (None, 40):
        inputs = CallableInputs(make, 80, 8, "wide", widest=widest)
        store = run(Sequences(), "encoder", inputs, tmp_path / str(widest), mask=real, shard_mb=0.04)
        sizes[widest] = max(shard.bytes for shard in store.shards)
    assert sizes[40] <= 40_000 < sizes[None]


def test_a_state_dict_may_hold_more_than_tensors(tmp_path):
    class Extra(Flat):
        version = 1

        def get_extra_state(self):
            return {"version": self.version, "scale": torch.ones(2), "other": object()}

        def set_extra_state(self, state):
            pass

    x = torch.randn(20, D)
    store = run(Extra(), "0", x, tmp_path / "s")
    assert same(run(Extra(), "0", x, tmp_path / "s"), store)
    Extra.version = 2
    with pytest.raises(ValueError, match="another one.*weights"):
        run(Extra(), "0", x, tmp_path / "s")
