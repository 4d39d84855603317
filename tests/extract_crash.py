"""python tests/extract_crash.py FOLDER [--kills 50] [--full-disk 10]: cuts extractions at random moments.

Each time a run is killed with SIGKILL (or the disk is full), is started again, and must end in a store that is equal,
file for file, to an undisturbed one. Runs are forked from a process that has imported everything: a kill costs a
second. For the full disk FOLDER must lie on a file system of 1 to 2 MB, such as
`mount -t tmpfs -o size=1500k tmpfs FOLDER`.
"""

import argparse
import errno
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from extract_models import Sequences, ids, real, run

from sae_kernels.data.store import ActivationStore, writer

LIMITED = 27


def extraction(store: Path) -> None:
    """Many small shards, shuffled, through two writers."""
    run(Sequences(), "encoder", ids(600), store, mask=real, shuffle=1, shard_mb=0.01, writers=2)


def forked(work) -> int:
    """Runs work() in a child; its pid. The child's exit code: 0, LIMITED where the disk was full, 1 otherwise."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except OSError as error:
        print(error, file=sys.stderr, flush=True)
        code = LIMITED if error.errno in (errno.ENOSPC, errno.EFBIG) else 1
    finally:
        os._exit(code)


def files(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


def looks_finished(store: Path) -> bool:
    try:
        ActivationStore.open(store)
    except (FileNotFoundError, ValueError):
        return False
    return True


def equal_after_resuming(store: Path, undisturbed: dict[str, bytes]) -> None:
    if looks_finished(store) and not undisturbed.items() <= files(store).items():
        raise SystemExit(f"{store} looks finished and is not the undisturbed store")
    if os.waitpid(forked(lambda: extraction(store)), 0)[1]:
        raise SystemExit("the resumed run failed")
    if files(store) != undisturbed or ActivationStore.open(store).verify():
        raise SystemExit(f"{store} is not the undisturbed store")


def kills(folder: Path, count: int, undisturbed: dict[str, bytes], seconds: float, chance: random.Random) -> None:
    """count kills at moments drawn from the whole of a run; a run that is resumed may be killed again."""
    done, store, shards = 0, folder / "killed", []
    while done < count:
        pid = forked(lambda: extraction(store))
        time.sleep(chance.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        if os.waitpid(pid, 0)[1] == 0:
            continue  # it had finished, just
        done += 1
        shards.append(len(list(store.glob("shard*.json"))) if store.exists() else 0)
        if chance.random() < 0.7:
            equal_after_resuming(store, undisturbed)
            shutil.rmtree(store)
    equal_after_resuming(store, undisturbed)
    print(f"{count} kills, with {min(shards)} to {max(shards)} shards done: every resumed store equal")


def full_disks(folder: Path, count: int, undisturbed: dict[str, bytes], chance: random.Random) -> None:
    """Fills the disk up to a random rest, runs into it, makes room, goes on."""
    store, ballast = folder / "full", folder / "ballast"
    total = sum(map(len, undisturbed.values()))
    for number in range(count):
        rest = int(chance.uniform(0.05, 0.9) * total)

        def squeezed(rest=rest, early=number % 2 == 0) -> None:
            # every second time the check before each shard is off: the write itself runs into the end
            if early:
                writer.StoreWriter.free = lambda self: None
            ballast.write_bytes(b"0" * max(shutil.disk_usage(folder).free - rest, 0))
            extraction(store)

        code = os.waitstatus_to_exitcode(os.waitpid(forked(squeezed), 0)[1])
        if code != LIMITED:
            raise SystemExit(f"the run on a disk with {rest} bytes ended with {code}")
        ballast.unlink()
        equal_after_resuming(store, undisturbed)
        shutil.rmtree(store)
    print(f"{count} full disks: every resumed store equal")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--full-disk", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.full_disk:
        writer.RESERVE = 0
    options.folder.mkdir(exist_ok=True, parents=True)
    store, start = options.folder / "undisturbed", time.monotonic()
    if os.waitpid(forked(lambda: extraction(store)), 0)[1]:
        raise SystemExit("the undisturbed run failed")
    seconds, undisturbed = time.monotonic() - start, files(store)
    print(f"undisturbed: {len(undisturbed) - 1} shards in {seconds:.2f} s")
    shutil.rmtree(store)
    chance = random.Random(options.seed)
    if options.kills:
        kills(options.folder, options.kills, undisturbed, seconds, chance)
    if options.full_disk:
        full_disks(options.folder, options.full_disk, undisturbed, chance)


if __name__ == "__main__":
    main()
