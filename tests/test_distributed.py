"""Several processes: batches shared by DDP, latents shared out, checkpoints read by another number of them."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.nn.functional import normalize

from sae_kernels import cli
from sae_kernels.nn import BatchTopKSAE, JumpReLUSAE, TopKSAE
from sae_kernels.train import Interrupted, fit, load_sae

pytestmark = pytest.mark.usefixtures("one_thread")

D_IN, D_SAE, K = 8, 32, 4
SETTINGS = {"steps": 12, "batch_size": 64, "log_every": 3, "progress": False, "lr": 3e-3}


def activations(rows=300):
    g = torch.Generator().manual_seed(3)
    atoms = normalize(torch.randn(16, D_IN, generator=g), dim=1)
    return (torch.rand(rows, 16, generator=g) * (torch.rand(rows, 16, generator=g) < 0.15)) @ atoms


def new_sae(kind=TopKSAE, **options):
    # latents die soon, so that AuxK has its part in the gradients
    settings = {"dead_after": 100, "k_aux": 3, "aux_rows": 11, "normalize": "standardize", **options}
    return kind(D_IN, D_SAE, K, generator=torch.Generator().manual_seed(1), **settings)


def largest_difference(a, b):
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


def _shares(rank, size, kind):
    """The loss, its parts and its gradients, added up over the processes."""
    x, weight = activations(45), torch.rand(45, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    whole, part = new_sae(kind).double(), new_sae(kind).double()
    for sae in (whole, part):
        if kind is JumpReLUSAE:
            sae.init_threshold(2 * x.double())
        sae.rows_since_fired[5:20] = 200
    part.data_group = dist.group.WORLD
    expected = whole.loss(x.double(), weight.double())
    expected.loss.backward()
    out = part.loss(x.double()[rank::size], weight.double()[rank::size])
    out.loss.backward()
    for wanted, share in zip(expected[:4], out[:4], strict=True):
        total = share.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, wanted.detach(), rtol=1e-6, atol=0)
    assert expected.aux > 0
    for (name, wanted), share in zip(whole.named_parameters(), part.parameters(), strict=True):
        dist.all_reduce(share.grad)
        torch.testing.assert_close(share.grad, wanted.grad, rtol=1e-10, atol=1e-12, msg=name)
    assert torch.equal(whole.rows_since_fired, part.rows_since_fired)
    assert (whole.rows_since_fired > 0).any() and (whole.rows_since_fired == 0).any()


@pytest.mark.parametrize("kind", [TopKSAE, JumpReLUSAE])
def test_shares_of_the_loss_add_up(tmp_path, kind):
    assert run_ranks(4, tmp_path, _shares, kind) == [None] * 4


def _thresholds(rank, size):
    """One threshold for all: the mean of what the processes' own parts of the batches gave."""
    x, alone, together = activations(90), new_sae(BatchTopKSAE), new_sae(BatchTopKSAE)
    together.data_group = dist.group.WORLD
    for sae in (alone, together):
        sae.loss(x[rank::size])
    total = alone.threshold.clone()
    dist.all_reduce(total)
    torch.testing.assert_close(together.threshold, total / size)


def test_processes_have_one_threshold(tmp_path):
    assert run_ranks(2, tmp_path, _thresholds) == [None] * 2


def _fit(rank, size, path, options):
    sae = new_sae() if rank == 0 else new_sae(tied_init=False)  # they start from the first one's weights
    result = fit(sae, activations(), group=dist.group.WORLD, **{**SETTINGS, **options})
    torch.save(sae.state_dict(), f"{path}/rank{rank}.pt")
    return result.history


@pytest.mark.parametrize("size", [2, 4])
def test_ddp_equals_one_process(tmp_path, size):
    rows = []
    options = {"clip": 0.05, "steps": 30}
    alone = new_sae()
    expected = fit(alone, activations(), log=rows.append, **{**SETTINGS, **options})
    histories = run_ranks(size, tmp_path, _fit, str(tmp_path), options)
    states = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(size)]
    for state in states[1:]:
        assert largest_difference(states[0], state) == 0
    assert max(row["aux"] for row in rows) > 0 and max(row["dead_share"] for row in rows) > 0
    # 30 Adam steps of lr 3e-3: rounding moves a weight by far less than one step does
    assert largest_difference(states[0], alone.state_dict()) < 1e-5
    assert torch.equal(states[0]["rows_since_fired"], alone.rows_since_fired)
    for history in histories:
        for row, wanted in zip(history, expected.history, strict=True):
            assert row == pytest.approx(wanted, rel=1e-4)


def _validated(rank, size):
    """A validation that uses the loss is that of the whole; the first process's flags are everyone's."""
    x = activations()
    sae = new_sae(normalize="global")
    if rank == 0:
        sae.fit_normalizer(x)
    result = fit(
        sae,
        x,
        group=dist.group.WORLD,
        validate=lambda sae: float(sae.loss(x).fvu),
        validate_every=12,
        **SETTINGS,
    )
    assert result.best == pytest.approx(float(sae.eval().loss(x).fvu), rel=1e-6)
    jump = new_sae(JumpReLUSAE)
    if rank == 0:
        jump.init_threshold(x)
    start = jump.threshold.detach().clone()
    fit(jump, x, group=dist.group.WORLD, **{**SETTINGS, "steps": 1, "lr": 1e-9})
    assert jump.started and (rank > 0 or torch.allclose(jump.threshold, start))
    return float(jump.threshold.detach().mean())


def test_validation_and_flags_are_those_of_one_process(tmp_path):
    first, second = run_ranks(2, tmp_path, _validated)
    assert first == second


def _interrupted(rank, size, path):
    """Ctrl-C reaches one process between two history rows: all stop together at the next one."""

    def press(row):
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(Interrupted) as caught:
        options = {"log": press if rank == 0 else None, "checkpoint": f"{path}/run", "group": dist.group.WORLD}
        fit(new_sae(), activations(), **SETTINGS, **options)
    assert caught.value.step == 3


def test_a_run_under_ddp_resumes_bit_for_bit_and_on_other_numbers(tmp_path):
    run_ranks(2, tmp_path, _interrupted, str(tmp_path))
    run_ranks(2, tmp_path, _fit, str(tmp_path), {})
    whole = torch.load(tmp_path / "rank0.pt")
    for size in (1, 2, 3):
        shutil.copytree(tmp_path / "run", tmp_path / f"run{size}")
        resume = {"checkpoint": f"{tmp_path}/run{size}", "resume": True}
        histories = run_ranks(size, tmp_path, _fit, str(tmp_path), resume)
        assert [row["step"] for row in histories[0]] == [3, 6, 9, 12]
        found = torch.load(tmp_path / "rank0.pt")
        assert largest_difference(found, whole) == 0 if size == 2 else 0 < largest_difference(found, whole) < 1e-5


def _bfloat16(rank, size, path):
    sae = new_sae()
    fit(sae, activations(), group=dist.group.WORLD, compute_dtype=torch.bfloat16, **SETTINGS)
    torch.save(sae.state_dict(), f"{path}/rank{rank}.pt")


def test_bfloat16_with_float32_weights(tmp_path):
    run_ranks(2, tmp_path, _bfloat16, str(tmp_path))
    found = torch.load(tmp_path / "rank0.pt")
    full, half, start = new_sae(), new_sae(), new_sae().state_dict()
    fit(full, activations(), **SETTINGS)
    fit(half, activations(), compute_dtype=torch.bfloat16, **SETTINGS)
    moved = (full.W_dec - start["W_dec"]).norm()
    assert half.W_enc.dtype == torch.float32 and found["W_enc"].dtype == torch.float32
    # updates of 1e-3 and less would be lost in weights kept in bfloat16, whose steps near 1 are 2^-7
    assert not torch.equal(half.W_dec, half.W_dec.bfloat16().float())
    for other in (half.W_dec, found["W_dec"]):
        assert 0 < (other - full.W_dec).norm() < 0.3 * moved


def _refused(rank, size):
    with pytest.raises(ValueError, match="batch_size 1 is too small for 2 processes"):
        fit(new_sae(), activations(), group=dist.group.WORLD, **{**SETTINGS, "batch_size": 1})
    with pytest.raises(ValueError, match="compute_dtype must be"):
        fit(new_sae(), activations(), compute_dtype=torch.int8, **SETTINGS)


def test_bad_settings_of_several_processes(tmp_path):
    assert run_ranks(2, tmp_path, _refused) == [None] * 2


def test_torchrun_trains_as_one_process_does(tmp_path, capsys):
    torch.save(activations(), tmp_path / "acts.pt")
    train = f"train {tmp_path}/acts.pt --width 4 --k 4 --steps 20 --batch-size 64 --normalize global"
    assert cli.main([*train.split(), "--out", str(tmp_path / "one")]) == 0
    ranks = f"-m torch.distributed.run --standalone --nproc-per-node 2 -m sae_kernels {train} --shard-latents 2"
    done = subprocess.run(
        [sys.executable, *ranks.split(), "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for shown in (done.stdout, capsys.readouterr().out):
        assert shown.count("20 steps in") == 1 and "on 15 held-out rows" in shown
    one, two = (load_sae(tmp_path / name).state_dict() for name in ("one", "two"))
    assert largest_difference(one, two) < 1e-5
