"""The plan: its arithmetic by hand, what limits a run, costs found again, the command."""

import json
import time

import pytest

from sae_kernels import cli
from sae_kernels import plan as plan_module
from sae_kernels.plan import CALIBRATION, CHECKS, Costs, Job, Rates, check, measure, plan, predicted, saturation

pytestmark = pytest.mark.usefixtures("one_thread")

# seconds: 1 ms a step, 1 ps a multiply-add, 10 ps a latent, 100 ps a slot, 20 ps a number, 50 ps a weight
COSTS = Costs(1e-3, 1e-12, 1e-11, 1e-10, 2e-11, 5e-11, "by hand")
JOB = Job(rows=10_000_000, d_in=100, d_sae=1000, k=10, batch_size=10_000)
FAST = Rates(1e12, 1e15, 1e15, 8)


def test_one_process_by_hand():
    found = plan(JOB, 1, COSTS, FAST)
    expected = {"overhead": 1e-3, "encoder": 1e-3, "choice": 1e-4, "sparse": 1e-5 + 2e-4, "adam": 1e-5}
    for name, seconds in expected.items():
        assert found["seconds"][name] == pytest.approx(seconds), name
    assert found["seconds"]["gradients between processes"] == found["seconds"]["latents between processes"] == 0
    step = sum(expected.values())
    assert found["step_seconds"] == pytest.approx(step) == pytest.approx(predicted(COSTS, 10_000, 100, 1000, 10))
    assert found["hours"] == pytest.approx(1000 * step / 3600)
    assert found["store_bytes"] == 10_000_000 * (200 + 8)
    assert found["process_bytes"] == 18 * 200_000 + 10_000 * (1200 + 160)


def test_reading_limits_a_run_and_more_nodes_read_more():
    slow = Rates(storage=1e8, within=1e15, between=1e15, per_node=8)
    found = plan(JOB, 8, COSTS, slow)
    assert found["driver"] == "storage" and found["step_seconds"] == pytest.approx(10_000 * 200 / 1e8)
    assert plan(JOB, 16, COSTS, slow)["step_seconds"] == pytest.approx(found["step_seconds"] / 2)
    assert plan(Job(10**7, 100, 1000, 10, 10_000, item=4), 8, COSTS, slow)["hours"] == pytest.approx(2 * found["hours"])
    assert plan(Job(10**7, 100, 1000, 10, 10_000, epochs=3), 8, COSTS, slow)["hours"] == pytest.approx(
        3 * found["hours"]
    )


def test_latents_are_spread_where_gradients_cost_more():
    wide = Job(rows=10**6, d_in=100, d_sae=100_000, k=10, batch_size=256)
    slow_links = Rates(1e12, 1e10, 1e10, 8)
    spread = plan(wide, 8, COSTS, slow_links)
    assert spread["shards"] == 8 and spread["seconds"]["gradients between processes"] == 0
    # 2 (n - 1) / n of [rows, d_in] and (n - 1) candidates of each row in 4 bytes
    assert spread["seconds"]["latents between processes"] == pytest.approx(256 * (1.75 * 100 + 7 * 10) * 4 / 1e10)
    narrow = Job(rows=10**6, d_in=100, d_sae=1000, k=10, batch_size=200_000)
    together = plan(narrow, 8, COSTS, slow_links)
    assert together["shards"] == 1
    assert together["seconds"]["gradients between processes"] == pytest.approx(1.75 * 200_000 * 4 / 1e10)
    # 7 processes cannot share 1000 latents evenly
    assert plan(Job(10**6, 100, 1000, 10, 256), 7, COSTS, slow_links)["shards"] == 1


def test_saturation_is_where_the_fixed_part_of_a_step_takes_over():
    found = saturation(JOB, COSTS, FAST)
    here, twice = (plan(JOB, n, COSTS, FAST)["hours"] for n in (found, 2 * found))
    before = plan(JOB, found // 2, COSTS, FAST)["hours"]
    assert found > 1 and here < 1.25 * twice and before >= 1.25 * here
    assert saturation(JOB, COSTS, Rates(storage=1, within=1e15, between=1e15)) == 1
    assert saturation(JOB, COSTS, FAST, most=found) is None and saturation(JOB, COSTS, FAST, most=2 * found) == found


def test_measuring_finds_planted_costs(monkeypatch):
    monkeypatch.setattr(plan_module, "_seconds", lambda *size: predicted(COSTS, *size[:4]))
    found = measure()
    for name in ("step", "mac", "latent", "slot", "number", "weight"):
        assert getattr(found, name) == pytest.approx(getattr(COSTS, name), rel=1e-6), name
    assert all(guess == pytest.approx(taken) for _, guess, taken in check(found))
    assert not set(CHECKS) & set(CALIBRATION)
    # costs that do not fit stay at 0 or above
    monkeypatch.setattr(plan_module, "_seconds", lambda *size: 1.0 + 1e-9 * size[0] ** 0.5)
    assert min(measure().step, measure().mac, measure().weight, measure().slot) >= 0


def test_costs_of_this_machine_grow_with_the_size():
    costs = measure(steps=1, clock=time.process_time)
    assert "measured here on cpu, 1 threads" in costs.source
    assert predicted(costs, 4096, 256, 4096, 32) > predicted(costs, 512, 64, 512, 8) > 0


def test_command(capsys):
    command = ["plan", "--rows", "1e9", "--d-in", "1024", "--d-sae", "65536", "--k", "64"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "2,056.0 GB" in shown and "nothing of it is measured" in shown and shown.count(" ms, by ") == 3
    assert cli.main([*command, "--json", "--gpus", "8", "--storage-gbs", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [way["processes"] for way in found["plans"]] == [8] and found["plans"][0]["driver"] == "storage"
    assert cli.main([*command, "--batch-size", "1e9", "--storage-gbs", "1e6"]) == 0
    assert "Up to 4096, twice as many are always at least 1.25 times as fast." in capsys.readouterr().out
    job = Job(10**9, 1024, 65536, 64)
    assert found["plans"][0]["hours"] == pytest.approx(plan(job, 8, rates=Rates(storage=1e9))["hours"])


@pytest.mark.parametrize(
    "option, message",
    [
        ("--rows 0", "rows must be at least 1, got 0"),
        ("--rows 1.5", "invalid count value: '1.5'"),
        ("--k 65", "k 65 must be at most d_sae 64"),
        ("--epochs 0", "epochs must be above 0"),
        ("--gpus 0", "processes must be between 1 and the 65536 rows of a batch, got 0"),
        ("--batch-size 4 --gpus 8", "between 1 and the 4 rows of a batch, got 8"),
        ("--storage-gbs 0", "storage must be above 0, got 0.0"),
        ("--check", "--check compares with what --measure finds"),
    ],
)
def test_mistakes(option, message, capsys):
    command = f"plan --rows 100 --d-in 8 --d-sae 64 --k 4 {option}".split()
    try:
        assert cli.main(command) == 2
    except SystemExit as exit:
        assert exit.code == 2
    assert message in capsys.readouterr().err
