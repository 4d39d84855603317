"""Extraction that is cut: killed at random moments, out of disk; the finished store is always the undisturbed one.

tests/extract_crash.py does the same fifty times.
"""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from extract_models import Sequences, ids, real, run

from sae_kernels.data.store import ActivationStore

HERE = Path(__file__).parent


def python(*arguments):
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_killed_at_random_moments(tmp_path):
    done = python(HERE / "extract_crash.py", tmp_path, "--kills", 5)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kills" in done.stdout and "every resumed store equal" in done.stdout


@pytest.fixture
def small_files():
    """No file may grow beyond 2,000 bytes, as if the disk were full: the write of a shard fails in its middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_fails_in_its_middle(tmp_path, small_files):
    x = ids(100)
    options = dict(mask=real, shard_mb=0.01)
    with pytest.raises(OSError, match=r"File too large while shard-00000000.safetensors was written; what is finished"):
        run(Sequences(), "encoder", x, tmp_path / "s", **options)
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["manifest.json"]
    with pytest.raises(ValueError, match="is not finished"):
        ActivationStore.open(tmp_path / "s")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store = run(Sequences(), "encoder", x, tmp_path / "s", **options)
    undisturbed = run(Sequences(), "encoder", x, tmp_path / "t", **options)
    assert [shard.sha256 for shard in store.shards] == [shard.sha256 for shard in undisturbed.shards]
    assert torch.equal(store.read(slice(None), "row").unique(), torch.arange(100))
