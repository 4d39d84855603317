"""python -m benchmarks.extraction: each part says what it measured, what was asked, and whether that is met."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.extraction.figures import at_least, at_most, in_turn, middle, ratio

ROOT = Path(__file__).parents[1]


def test_verdicts(capsys):
    at_most("cost", 1.1, 1.1)
    at_most("cost", 1.101, 1.1, "(two rounds)")
    at_least("rate", 0.8, 0.8)
    at_least("rate", 0.799, 0.8)
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["met", "MET", "met", "MET"]


def test_rounds_go_in_turn_and_are_compared_in_pairs():
    calls = []
    one, two = in_turn([lambda: calls.append(1), lambda: calls.append(2)], 3, lambda: calls.append(0))
    assert calls == [0, 1, 0, 2] * 3 and len(one) == len(two) == 3
    median, spread = ratio([(2.0, 9), (9.0, 9), (8.0, 9)], [(1.0, 1), (3.0, 1), (2.0, 1)])
    assert median == 3 and spread == "(2.00 to 4.00 in 3 rounds)"
    assert ratio([(2.0, 9)], [(1.0, 3)], which=1)[0] == 3
    assert middle([(1.0, 7), (5.0, 8), (2.0, 9)]) == 2 and middle([(1.0, 7), (5.0, 9), (2.0, 8)], 1) == 8


@pytest.mark.parametrize(
    "part, options, lines",
    [
        ("write", "--megabytes 20", ["write: store / plain rate, writers=1", "write: store / plain rate, writers=2"]),
        ("read", "--megabytes 40", ["read: 256 B rows, page cache, buffer 8 MiB", "read: 2048 B rows, disk"]),
        ("memory", "--memory-positions 4e4", ["memory: peak with ", "memory: four times the rows take"]),
        ("log", "--positions 2e4", ["log: extraction / forward, wall time", "log: files / payload"]),
    ],
)
def test_parts(tmp_path, part, options, lines):
    pytest.importorskip("numpy", reason="needs numpy: pip install 'sae-kernels[store]'")
    command = [sys.executable, "-m", "benchmarks.extraction", "--part", part, "--rounds", "1", *options.split()]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for line in lines:
        assert re.search(rf"^{re.escape(line)}.*", done.stdout, re.M), done.stdout
    assert not list(tmp_path.iterdir()), "what was written for a while is gone"
