"""Another commit of this repository, built in a throw-away worktree."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Checkout(NamedTuple):
    folder: Path
    commit: str


@contextlib.contextmanager
def base_checkout(revision: str) -> Iterator[Checkout]:
    """A worktree of `revision` with its native library built; removed afterwards.

    Raises ValueError where this is no git checkout or the revision is unknown, OSError where it does not build.
    """
    folder = Path(__file__).parents[2]
    git = ["git", "-C", str(folder)]
    found = subprocess.run([*git, "rev-parse", "--short=10", f"{revision}^{{commit}}"], capture_output=True, text=True)
    if found.returncode:
        raise ValueError(f"--base {revision!r}: no such commit in {folder}: {found.stderr.strip().splitlines()[0]}")
    with tempfile.TemporaryDirectory(prefix="sae-kernels-base-") as parent:
        worktree = Path(parent) / "worktree"
        subprocess.run([*git, "worktree", "add", "--detach", "-q", str(worktree), found.stdout.strip()], check=True)
        try:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            built = subprocess.run(build, cwd=worktree, capture_output=True, text=True)
            if built.returncode:
                raise OSError(f"--base {revision!r} does not build: {built.stderr.strip()[-300:]}")
            yield Checkout(worktree, found.stdout.strip())
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(worktree)], check=True)
