"""The same extraction over several processes: torchrun, and Ray Data with a worker that is killed in the middle."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from extract_models import Sequences, ids, real, run, same

from sae_kernels.data.store import ActivationStore

HERE = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    "GLOO_SOCKET_IFNAME": "lo",
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run(
        Sequences(), "encoder", ids(300), tmp_path_factory.mktemp("one") / "s", mask=real, shuffle=1, shard_mb=0.01
    )
    torch.set_num_threads(before)


def script(tmp_path, text):
    (tmp_path / "script.py").write_text(textwrap.dedent(text))
    return str(tmp_path / "script.py")


def test_torchrun_with_two_processes(tmp_path, undisturbed):
    path = script(
        tmp_path,
        """
        import os, sys, torch
        from extract_models import Sequences, ids, real, run
        torch.set_num_threads(1)
        # the first start is cut: rank 1 dies while it makes its second shard
        calls = []
        def prepare(x):
            calls.append(1)
            if sys.argv[2] == "cut" and os.environ["RANK"] == "1" and len(calls) == 4:
                os.kill(os.getpid(), 9)
            return x
        store = run(Sequences(), "encoder", ids(300), sys.argv[1], mask=real, shuffle=1, shard_mb=0.01,
                    engine="torchrun", prepare=prepare)
        with open(f"{sys.argv[1]}.{sys.argv[2]}.{os.environ['RANK']}", "w") as file:
            print(store.rows, len(calls), file=file)
        """,
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]

    def start(port, how):
        command = [*launch, str(port), path, str(tmp_path / "s"), how]
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)

    assert start(free_port(), "cut").returncode != 0
    with pytest.raises(ValueError, match="is not finished"):
        ActivationStore.open(tmp_path / "s")
    done = start(free_port(), "whole")
    assert done.returncode == 0, done.stderr
    ranks = [(tmp_path / f"s.whole.{rank}").read_text().split() for rank in (0, 1)]
    assert {rows for rows, _ in ranks} == {str(undisturbed.rows)}
    assert all(1 < int(calls) < 38 for _, calls in ranks), "both made a share, neither made all"
    assert same(ActivationStore.open(tmp_path / "s"), undisturbed)


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_ray_with_a_killed_worker(tmp_path, undisturbed):
    pytest.importorskip("ray", reason="needs Ray: pip install 'sae-kernels[ray]'")
    path = script(
        tmp_path,
        """
        import os, sys, time
        from pathlib import Path
        import ray, torch
        from extract_models import Sequences, ids, real, run

        pids, driver = Path(sys.argv[2]), os.getpid()
        def model():  # each actor makes its own
            torch.set_num_threads(1)
            return Sequences()
        def prepare(x):
            (pids / str(os.getpid())).touch()
            # the first actor waits for the second: two are at work when one is killed
            deadline = time.monotonic() + 90
            while os.getpid() != driver and len(os.listdir(pids)) < 3 and time.monotonic() < deadline:
                time.sleep(0.02)
            return x
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error")
        store = run(model, "encoder", ids(300), sys.argv[1], mask=real, shuffle=1, shard_mb=0.01, engine="ray",
                    workers=2, prepare=prepare)
        print("rows", store.rows, flush=True)
        """,
    )
    pids = tmp_path / "pids"
    pids.mkdir()
    process = subprocess.Popen(
        [sys.executable, path, str(tmp_path / "s"), str(pids)],
        env={**ENVIRONMENT, "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    killed, deadline = None, time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        # this process ran the first batch to see what comes; the others are the actors
        actors = [pid for pid in os.listdir(pids) if pid != str(process.pid)]
        if killed is None and len(actors) >= 2 and len(list((tmp_path / "s").glob("shard*.json"))) >= 2:
            killed = actors[0]
            os.kill(int(killed), signal.SIGKILL)
        time.sleep(0.01)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and f"rows {undisturbed.rows}" in out, err
    assert killed is not None
    assert same(ActivationStore.open(tmp_path / "s"), undisturbed)


def test_engines_refuse_what_they_cannot_do(tmp_path, monkeypatch):
    x = ids()
    batches = list(x.split(8))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="engine='torchrun' needs inputs that can be sought, got IteratorInputs"):
        run(Sequences(), "encoder", batches, tmp_path / "s", mask=real, engine="torchrun")
    pytest.importorskip("ray", reason="needs Ray: pip install 'sae-kernels[ray]'")
    with pytest.raises(ValueError, match="engine='ray' needs inputs that can be sought, got IteratorInputs"):
        run(Sequences(), "encoder", batches, tmp_path / "s", mask=real, engine="ray")
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        run(Sequences(), "encoder", x, tmp_path / "s", mask=real, engine="ray", workers=0)
    assert not (tmp_path / "s").exists()
