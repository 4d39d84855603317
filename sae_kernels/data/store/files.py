"""Where a store's files live: a local folder, or a bucket behind fsspec. Both put a whole file in place at once."""

import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..._need import need
from ..._sync import sync

Parts = Sequence[bytes | memoryview]
TEMPORARY = ".tmp"


class Files(Protocol):
    """A flat set of files by name; names may hold one "/"."""

    url: str

    def read(self, name: str) -> bytes:
        """The whole file; FileNotFoundError where it is absent."""
        ...

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        """Several files, at once where that is faster; those that are absent are left out."""
        ...

    def write(self, name: str, parts: Parts) -> None:
        """Puts the file in place whole, or not at all; it outlives a power cut once this returns."""
        ...

    def names(self) -> dict[str, int]:
        """Every file and its bytes; temporary ones of unfinished writes are not among them."""
        ...

    def remove(self, name: str) -> None: ...

    def clean(self) -> None:
        """Removes what writes that were cut left behind; only where no other process writes."""
        ...

    def free(self) -> int | None:
        """Bytes that can still be written; None where nobody knows."""
        ...

    def local(self, name: str) -> Path | None:
        """A path that can be memory-mapped, or None."""
        ...


def open_files(path: str | os.PathLike, storage_options: dict[str, Any] | None = None) -> Files:
    """The Files at a local path or a URL that fsspec knows ("s3://bucket/folder", "memory://x").

    Raises ConnectionError for a place that cannot be reached, ImportError where its package is missing.
    """
    text = os.fspath(path)
    if text.startswith("file://"):
        text = text[len("file://") :]
    if "://" not in text:
        if storage_options:
            raise ValueError(f"storage_options are for URLs such as s3://bucket/folder; {text!r} is a local folder")
        return LocalFiles(Path(text))
    return RemoteFiles(text, storage_options)


class LocalFiles:
    """A folder: written under a temporary name, synced, renamed, and the folder synced."""

    def __init__(self, root: Path) -> None:
        self.root, self.url = root, str(root)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        return {name: self.read(name) for name in names if (self.root / name).is_file()}

    def write(self, name: str, parts: Parts) -> None:
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}{TEMPORARY}")
        try:
            with open(fresh, "wb", buffering=0) as file:
                for part in parts:
                    _write_all(file, memoryview(part))
                os.fsync(file.fileno())
            os.replace(fresh, target)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        sync(target.parent)

    def names(self) -> dict[str, int]:
        if not self.root.is_dir():
            return {}
        found = {}
        for folder, _, files in os.walk(self.root):
            for name in files:
                path = Path(folder, name)
                if not name.endswith(TEMPORARY):
                    found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return found

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def clean(self) -> None:
        for path in self.root.rglob(f".*{TEMPORARY}"):
            path.unlink(missing_ok=True)

    def free(self) -> int | None:
        place = self.root.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def local(self, name: str) -> Path | None:
        return self.root / name


class RemoteFiles:
    """Objects under a URL. An object store has no rename: an object appears whole when its upload ends, or never."""

    def __init__(self, url: str, storage_options: dict[str, Any] | None) -> None:
        self.url = url.rstrip("/")
        fsspec = need("fsspec", f"a store at {url}", "store")
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **(storage_options or {}))
        except ImportError as error:
            raise ImportError(f"{url}: {error}") from None
        self._root = root.rstrip("/")
        self._reach()

    def _reach(self) -> None:
        """An unreachable or missing bucket is told at once, not after the first shard has been computed."""
        try:
            self._fs.find(self._root)
        except FileNotFoundError:
            bucket = self._root.partition("/")[0]
            raise ConnectionError(f"{self.url}: no such bucket: {bucket!r}") from None
        except Exception as error:  # every backend has errors of its own
            raise ConnectionError(f"{self.url} cannot be reached: {type(error).__name__}: {error}") from error

    def read(self, name: str) -> bytes:
        return self._fs.cat_file(f"{self._root}/{name}")

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        # a single path would give its bytes alone
        found = self._fs.cat([f"{self._root}/{name}" for name in names], on_error="omit") if names else {}
        return {path[len(self._root) + 1 :]: data for path, data in sorted(found.items())}

    def write(self, name: str, parts: Parts) -> None:
        self._fs.pipe_file(f"{self._root}/{name}", b"".join(parts))

    def names(self) -> dict[str, int]:
        found = self._fs.find(self._root, detail=True)
        return {path[len(self._root) + 1 :]: facts["size"] for path, facts in found.items()}

    def remove(self, name: str) -> None:
        try:
            self._fs.rm_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return

    def clean(self) -> None:
        return

    def free(self) -> int | None:
        return None

    def local(self, name: str) -> Path | None:
        return None


def _write_all(file: Any, part: memoryview) -> None:
    # one write may stop at 2 GiB, or at a limit; the next one then says why
    while part:
        part = part[file.write(part) :]
