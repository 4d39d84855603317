"""Ragged rows as (flat, offsets): flat [nnz] int64 item codes, offsets [rows + 1] int64."""

import torch
from torch import Tensor


def row_ids(offsets: Tensor) -> Tensor:
    """The row of every entry of flat: [nnz] int64."""
    lengths = offsets.diff()
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=offsets.device), lengths)


def take(flat: Tensor, offsets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The given rows, in the given order, as a new (flat, offsets)."""
    starts, lengths = offsets[rows], offsets[rows + 1] - offsets[rows]
    out = torch.zeros(rows.numel() + 1, dtype=torch.int64, device=flat.device)
    torch.cumsum(lengths, 0, out=out[1:])
    source = torch.arange(int(out[-1]), device=flat.device) + torch.repeat_interleave(starts - out[:-1], lengths)
    return flat[source], out


def distinct(flat: Tensor, offsets: Tensor, n_items: int) -> tuple[Tensor, Tensor]:
    """The same rows with every item once, where it first stands; the very tensors where no item stands twice."""
    pairs = row_ids(offsets) * n_items + flat
    ranked, order = pairs.sort(stable=True)
    again = ranked[1:] == ranked[:-1]
    if not bool(again.any()):
        return flat, offsets
    kept = torch.ones_like(pairs, dtype=torch.bool)
    kept[order[1:]] = ~again
    return keep(flat, offsets, kept)


def keep(flat: Tensor, offsets: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with only the entries of flat where kept [nnz] bool is True."""
    counts = torch.zeros(kept.numel() + 1, dtype=torch.int64, device=kept.device)
    torch.cumsum(kept, 0, out=counts[1:])
    return flat[kept], counts[offsets]


def multi_hot(flat: Tensor, offsets: Tensor, n_items: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[rows, n_items] of zeros and ones; an item that stands twice in a row counts once."""
    dense = torch.zeros(offsets.numel() - 1, n_items, dtype=dtype, device=flat.device)
    dense[row_ids(offsets), flat] = 1
    return dense


def pad_left(flat: Tensor, offsets: Tensor, length: int) -> Tensor:
    """[rows, length] int64: the last `length` entries of every row, as code + 1, with 0 for padding on the left."""
    rows = row_ids(offsets)
    from_end = offsets[1:][rows] - torch.arange(flat.numel(), device=flat.device)
    inside = from_end <= length
    padded = torch.zeros(offsets.numel() - 1, length, dtype=torch.int64, device=flat.device)
    padded[rows[inside], length - from_end[inside]] = flat[inside] + 1
    return padded
