"""What has been written outlives a power cut."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Waits until the file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():  # which has no handle for that
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
