"""Latents spread over processes: the whole's choice bit for bit, its gradients, its run, and checkpoints that move."""

import shutil

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_distributed import D_IN, D_SAE, SETTINGS, K, activations, largest_difference, new_sae

from sae_kernels.eval.reconstruction import evaluate_reconstruction
from sae_kernels.nn.sae import TopKSAE
from sae_kernels.nn.sharded import ShardedTopKSAE
from sae_kernels.train import fit, load_sae, save_sae

pytestmark = pytest.mark.usefixtures("one_thread")


def sharded_sae(group=None, **options):
    settings = {"dead_after": 100, "k_aux": 3, "aux_rows": 11, "normalize": "standardize", **options}
    generator = torch.Generator().manual_seed(1)
    group = dist.group.WORLD if group is None else group
    return ShardedTopKSAE(D_IN, D_SAE, K, shard_group=group, generator=generator, **settings)


def block(t, rank, size):
    return t.chunk(size)[rank]


def integers(n, d, seed):
    """Small integers: every product is exact and most pre-activations have equals."""
    return torch.randint(-2, 3, (n, d), generator=torch.Generator().manual_seed(seed)).float()


def _selection(rank, size):
    for activation in ("relu", "none", "abs"):
        whole, sharded = (
            new_sae(activation=activation, normalize="none"),
            sharded_sae(activation=activation, normalize="none"),
        )
        for exact in (False, True):
            if exact:
                W, b = integers(D_SAE, D_IN, 5), integers(1, D_SAE, 6)[0]
                for sae, part in ((whole, slice(None)), (sharded, slice(sharded.first, sharded.first + D_SAE // size))):
                    sae.W_enc.data, sae.b_enc.data = W[part].clone(), b[part].clone()
            x = integers(200, D_IN, 7) if exact else activations(200)
            wanted, code = whole.encode(x), sharded.encode(x)
            assert torch.equal(code.indices, wanted.indices) and torch.equal(code.values, wanted.values)
            torch.testing.assert_close(sharded.decode(code), whole.decode(wanted), rtol=1e-5, atol=1e-5)
            # what loss() chooses is the same, each process holding its own slots of it
            mine = sharded.loss(x).code.to_dense()
            dist.all_reduce(mine)
            assert torch.equal(mine, whole.loss(x).code.to_dense())
        whole.refit = sharded.refit = 3
        wanted, code = whole.encode(x), sharded.encode(x)
        torch.testing.assert_close(code.to_dense(), wanted.to_dense(), rtol=1e-4, atol=1e-4)
    x = activations(50)
    x[3, 2] = float("nan")
    wanted, code = whole.encode(x), sharded.encode(x)
    assert torch.equal(code.indices, wanted.indices) and wanted.values[3].isnan().all()
    assert sharded.encode(x[:0]).values.shape == (0, K) and sharded(x[:0]).shape == (0, D_IN)
    assert sharded.encode(x.reshape(5, 10, D_IN)).indices.shape == (5, 10, K)


@pytest.mark.parametrize("size", [2, 4])
def test_selection_is_bit_for_bit_that_of_the_whole(tmp_path, size):
    assert run_ranks(size, tmp_path, _selection) == [None] * size


def _gradients(rank, size):
    x, weight = activations(45).double(), torch.rand(45, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    for activation in ("relu", "none", "abs"):
        whole, sharded = new_sae(activation=activation).double(), sharded_sae(activation=activation).double()
        whole.rows_since_fired[5:20] = 200
        sharded.rows_since_fired.copy_(block(whole.rows_since_fired, rank, size))
        expected, out = whole.loss(x, weight), sharded.loss(x, weight)
        for wanted, found in zip(expected[:4], out[:4], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
        assert expected.aux > 0
        expected.loss.backward()
        out.loss.backward()
        for name, p in sharded.named_parameters():
            wanted = getattr(whole, name).grad
            wanted = block(wanted, rank, size) if name in sharded.sharded else wanted
            torch.testing.assert_close(p.grad, wanted, rtol=1e-8, atol=1e-12, msg=f"{activation} {name}")
        assert torch.equal(sharded.rows_since_fired, block(whole.rows_since_fired, rank, size))


def test_gradients_and_dead_counters_are_those_of_the_whole(tmp_path):
    assert run_ranks(4, tmp_path, _gradients) == [None] * 4


def _fit(rank, size, path, shards, options):
    """Trains over `shards` processes to an SAE, and as many copies as the others make up."""
    groups = [dist.new_group(range(i, i + shards)) for i in range(0, size, shards)]
    copies = [dist.new_group(range(i, size, shards)) for i in range(shards)]
    group = copies[rank % shards] if size > shards else None
    sae = sharded_sae(groups[rank // shards]) if shards > 1 else new_sae()
    result = fit(sae, activations(), group=group, **{**SETTINGS, **options})
    figures = evaluate_reconstruction(sae, activations(100))
    if rank % shards == 0:
        torch.save(sae.b_dec.detach(), f"{path}/b_dec-{rank}.pt")
    return result.history, figures


def shards_of(options, tmp_path, name):
    return {**options, "checkpoint": str(tmp_path / name)}


@pytest.mark.parametrize("size, shards", [(2, 2), (4, 4), (4, 2)])
def test_a_sharded_run_equals_the_unsharded_one(tmp_path, size, shards):
    """Clipped hard, so that a norm of one part alone would show; with 4 processes also two copies of two parts."""
    options = {"clip": 0.05, "steps": 30}
    alone = new_sae()
    expected = fit(alone, activations(), **{**SETTINGS, **options})
    found = run_ranks(size, tmp_path, _fit, str(tmp_path), shards, shards_of(options, tmp_path, "run"))
    sae = load_sae(tmp_path / "run")
    assert type(sae) is TopKSAE
    assert largest_difference(sae.state_dict(), alone.state_dict()) < 1e-5
    assert torch.equal(sae.rows_since_fired, alone.rows_since_fired)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE), rtol=0, atol=1e-5)
    assert max(row["aux"] for row in expected.history) > 0
    for history, figures in found:
        for row, wanted in zip(history, expected.history, strict=True):
            assert row == pytest.approx(wanted, rel=1e-4)
        assert figures == pytest.approx(evaluate_reconstruction(alone, activations(100)), rel=1e-4)
    unclipped = new_sae()
    fit(unclipped, activations(), **{**SETTINGS, **options, "clip": None})
    assert largest_difference(unclipped.state_dict(), alone.state_dict()) > 1e-3


def _frozen(rank, size):
    sae = sharded_sae()
    for p in (sae.b_enc, sae.b_dec):
        p.requires_grad_(False)
    before = [p.clone() for p in (sae.b_enc, sae.b_dec, sae.W_enc)]
    fit(sae, activations(), **{**SETTINGS, "clip": 0.05})
    same = [torch.equal(p, old) for p, old in zip((sae.b_enc, sae.b_dec, sae.W_enc), before, strict=True)]
    assert same == [True, True, False]


def test_frozen_biases_are_left_out_of_the_norm(tmp_path):
    assert run_ranks(2, tmp_path, _frozen) == [None] * 2


def _stopped(rank, size, options):
    """All processes leave after step 9, as when they are killed; the checkpoint of step 7 stays."""
    from sae_kernels.train import loop

    advance = loop._advance

    def killed(run, batch, bar):
        advance(run, batch, bar)
        if run.step == 9:
            raise RuntimeError("killed")

    loop._advance = killed
    try:
        with pytest.raises(RuntimeError, match="killed"):
            fit(sharded_sae(), activations(), checkpoint_every=7, **options)
    finally:
        loop._advance = advance


def test_a_checkpoint_resumes_on_any_number_of_processes(tmp_path):
    """Of 4 on 4 (bit for bit), 2, 1 and two copies of 2; of 1 on 2."""
    options = {"validate": activations(64), "validate_every": 2, "patience": 5}
    run_ranks(4, tmp_path, _fit, str(tmp_path), 4, shards_of(options, tmp_path, "whole"))
    whole = load_sae(tmp_path / "whole").state_dict()
    run_ranks(4, tmp_path, _stopped, {**SETTINGS, **shards_of(options, tmp_path, "run")})
    assert torch.load(tmp_path / "run" / "training.pt")["step"] == 7
    for size, shards in ((4, 4), (2, 2), (1, 1), (4, 2)):
        name = f"run{size}-{shards}"
        shutil.copytree(tmp_path / "run", tmp_path / name)
        resume = {**shards_of(options, tmp_path, name), "resume": True}
        (history, _), *_ = run_ranks(size, tmp_path, _fit, str(tmp_path), shards, resume)
        assert [row["step"] for row in history if "fvu" in row] == [3, 6, 9, 12]
        found = largest_difference(load_sae(tmp_path / name).state_dict(), whole)
        assert found == 0 if shards == 4 else 0 < found < 1e-5


def test_a_run_of_one_process_goes_on_sharded(tmp_path):
    def kill(row):
        if row["step"] >= 9:
            raise InterruptedError

    alone = new_sae()
    fit(alone, activations(), **SETTINGS)
    with pytest.raises(InterruptedError):
        fit(new_sae(), activations(), checkpoint=tmp_path / "run", checkpoint_every=7, log=kill, **SETTINGS)
    run_ranks(2, tmp_path, _fit, str(tmp_path), 2, {**shards_of({}, tmp_path, "run"), "resume": True})
    found = load_sae(tmp_path / "run").state_dict()
    assert 0 < largest_difference(found, alone.state_dict()) < 1e-5


def _refused(rank, size, path):
    group = dist.group.WORLD
    with pytest.raises(ValueError, match="d_sae 32 must be a multiple of the 3 processes"):
        ShardedTopKSAE(D_IN, 32, K, shard_group=group)
    with pytest.raises(ValueError, match="k 11 must be at most the 10 latents of each of 3 processes"):
        ShardedTopKSAE(D_IN, 30, 11, shard_group=group)
    sae = ShardedTopKSAE(D_IN, 30, K, shard_group=group)
    with pytest.raises(ValueError, match=r"processes \[0, 1, 2\] share its latents too"):
        fit(sae, activations(), group=group, **SETTINGS)
    with pytest.raises(ValueError, match="must all be whole, or all be spread"):
        fit({"a": sae, "b": TopKSAE(D_IN, 30, K)}, activations(), **SETTINGS)
    with pytest.raises(TypeError, match="this one is in parts"):
        save_sae(ShardedTopKSAE(D_IN, 30, K, shard_group=group), path)


def test_what_cannot_be_shared_out(tmp_path):
    run_ranks(3, tmp_path, _refused, str(tmp_path / "sae"))
    assert not (tmp_path / "sae").exists()
