"""Shard files: tensors to the bytes of a .safetensors file, without a copy, and back."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..._need import need
from .files import Files
from .manifest import Field, Shard

# the rows of a shard: the same tensors by field in each part, [rows of the part, ...]
Parts = Sequence[dict[str, Tensor]]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}


def serialise(parts: Parts) -> list[bytes | memoryview]:
    """The file's header and the memory of each tensor, part after part; widest dtype first, so that each is aligned."""
    order = sorted(parts[0], key=lambda name: (-parts[0][name].dtype.itemsize, name))
    header, end, data = {"__metadata__": {"format": "pt"}}, 0, []
    for name in order:
        pieces = [part[name] for part in parts]
        start, end = end, end + sum(t.nbytes for t in pieces)
        shape = [sum(map(len, pieces)), *pieces[0].shape[1:]]
        header[name] = {"dtype": _NAMES[pieces[0].dtype], "shape": shape, "data_offsets": [start, end]}
        data += [memoryview(t.contiguous().view(-1).view(torch.uint8).numpy()) for t in pieces]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *data]


def digest(parts: list[bytes | memoryview]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


def load(files: Files, shard: Shard) -> dict[str, Tensor]:
    """The tensors of a shard: memory-mapped where the files are local, else fetched whole.

    Raises FileNotFoundError, or ValueError naming the shard where the file is damaged.
    """
    safetensors = need("safetensors", "a store", "store")
    path = files.local(shard.name)
    try:
        if path is None:
            return need("safetensors.torch", "a store", "store").load(files.read(shard.name))
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{files.url}: {shard.name} is damaged: {error}") from None


def check(files: Files, shard: Shard, fields: dict[str, Field]) -> str | None:
    """What is wrong with a shard file, as one text; None where it is whole."""
    path = files.local(shard.name)
    try:
        size, found = _sha256(path) if path is not None else _sha256_of(files.read(shard.name))
    except FileNotFoundError:
        return "the file is missing"
    if size != shard.bytes:
        return f"the file has {size:,} bytes, the manifest says {shard.bytes:,}"
    if found != shard.sha256:
        return f"sha256 is {found[:12]}..., the manifest says {shard.sha256[:12]}..."
    tensors = load(files, shard)
    wanted = {name: (f.dtype, (shard.rows, *f.shape)) for name, f in fields.items()}
    came = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    return None if came == wanted else f"the file holds {came}, the manifest says {wanted}"


def _sha256(path: Path) -> tuple[int, str]:
    sha, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
            size += len(block)
    return size, sha.hexdigest()


def _sha256_of(data: bytes) -> tuple[int, str]:
    return len(data), hashlib.sha256(data).hexdigest()
