"""Rows of memory-mapped shards: asked for ahead of their use, and copied to their places in a buffer."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import _native

_lib = torch.library.Library("sae_kernels", "FRAGMENT")
_lib.define("shard_rows_scatter(Tensor[] shards, Tensor spans, Tensor order, Tensor(a!) out) -> ()")
_lib.define("shard_rows_ask(Tensor[] shards, Tensor spans, bool told) -> ()")


def mapped(path: Path) -> Tensor:
    """uint8 [rows, bytes of a row]: the field x of a shard file, memory-mapped; only the header is read.

    (safetensors touches what it maps, and the system then reads megabytes around, which are waited for.) Raises
    FileNotFoundError, or ValueError naming a damaged file.
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            x = json.loads(file.read(size))["x"]
        begin, end = (8 + size + offset for offset in x["data_offsets"])
        return torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8)[begin:].view(x["shape"][0], -1)
    except (KeyError, MemoryError, OverflowError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def scatter(shards: Sequence[Tensor], spans: Tensor, order: Tensor, out: Tensor) -> None:
    """out[order[i]] = row i of all spans, one after another.

    shards uint8 [rows, bytes of a row], the one of each span; spans int64 [n, 2]: first row and rows; order int64 [m];
    out uint8 [m, bytes of a row], rows at any distance.
    """
    if _native.cpu_loaded():
        torch.ops.sae_kernels.shard_rows_scatter.default(shards, spans, order, out)
        return
    row, done = f"V{out.shape[1]}", 0
    to, places = out.numpy().view(row)[:, 0], order.numpy()
    for shard, (begin, count) in zip(shards, spans.tolist(), strict=True):
        to[places[done : done + count]] = shard.numpy()[begin : begin + count].view(row)[:, 0]
        done += count


def ask(shards: Sequence[Tensor], spans: Tensor, told: bool) -> None:
    """Begins to read the spans that are not in memory, or all where the system does not tell (told is False).

    Nothing happens without the native library.
    """
    if _native.cpu_loaded():
        torch.ops.sae_kernels.shard_rows_ask.default(shards, spans, told)
