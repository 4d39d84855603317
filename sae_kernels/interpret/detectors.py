"""Columns of numbers as detectors of concepts: dense scores of items, a tile of columns at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..data.histories import Histories
from ..nn import SparseCode
from ..ops import _checks

TILE = 128  # columns that exist at once


@dataclass(frozen=True)
class DetectorScores:
    """Every column against every concept, both [n_concepts, m] float64.

    auc: chance that a row with the concept has a larger value than one without, ties counting half. correlation:
    Pearson's of the value with the label; 0 for a column of one value. NaN for a concept that all rows or none have.
    """

    auc: Tensor
    correlation: Tensor


@torch.no_grad()
def detector_scores(tiles: Iterable[Tensor], labels: Tensor) -> DetectorScores:
    """Scores the columns of all tiles, [rows, any] each, floating, in their order; labels [rows, n_concepts] bool.

    What concept_scores is to sparse codes, for columns without silence: projections (`lens_tiles`), means over users
    (`audience_tiles`), raw dimensions ([x]). Time goes with rows * m * log(rows); nothing but a tile and the scores is
    kept. Raises TypeError or ValueError that names the argument.
    """
    op = "detector_scores"
    _checks.tensor(op, "labels", labels, 2)
    if labels.dtype != torch.bool:
        raise TypeError(f"{op}: labels must be bool, got {labels.dtype}")
    y, rows = labels.double(), len(labels)
    n_with = y.sum(0).unsqueeze(1)
    both = n_with * (rows - n_with)
    auc, correlation = [y.new_zeros(y.shape[1], 0)], [y.new_zeros(y.shape[1], 0)]
    for tile in tiles:
        _check_tile(op, tile, rows)
        auc.append((y.T @ _mid_ranks(tile) - n_with * (n_with + 1) / 2) / both)
        centred = tile.double() - tile.double().mean(0)
        # a column of one value: what rounding leaves of it is not a spread
        one_value = (tile == tile[:1]).all(0)
        norm = (both / max(rows, 1)).sqrt() * centred.norm(dim=0).masked_fill(one_value, torch.inf)
        correlation.append((y.T @ centred / norm).masked_fill(both == 0, torch.nan))
    return DetectorScores(torch.cat(auc, 1), torch.cat(correlation, 1))


def lens_tiles(directions: Tensor, items: Tensor) -> Iterator[Tensor]:
    """The logit lens of every direction on every item: [n_items, up to TILE] each.

    directions [m, d], such as W_dec; items [n_items, d]: of a linear head. A unit of latent f adds
    W_dec[f] . items[i] to the score of item i.
    """
    if directions.shape[1] != items.shape[1]:
        shapes = f"directions {tuple(directions.shape)} and items {tuple(items.shape)}"
        raise ValueError(f"lens_tiles: {shapes} must end in one d")
    return (items @ tile.to(items).T for tile in directions.detach().split(TILE))


def audience_tiles(columns: SparseCode | Tensor, histories: Histories) -> Iterator[Tensor]:
    """What an item's users are like: the mean of every column over the users who have it, [n_items, up to TILE] each.

    columns: the users' code [n_users, k], or a dense [n_users, m]; histories: theirs. 0 for an item that nobody has.
    """
    n_users = len(columns) if isinstance(columns, Tensor) else len(columns.values)
    if n_users != len(histories):
        raise ValueError(f"audience_tiles: {n_users} rows of columns and {len(histories)} users in histories")
    histories = histories.distinct()
    order = histories.flat.argsort(stable=True)
    users = histories.row_ids()[order]
    counts = torch.bincount(histories.flat, minlength=histories.n_items)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    for tile in columns.split(TILE, 1) if isinstance(columns, Tensor) else _dense_tiles(columns):
        yield embedding_bag(users, tile, ends, mode="mean", include_last_offset=True)


def _dense_tiles(code: SparseCode) -> Iterator[Tensor]:
    """The code's columns [rows, up to TILE], a tile at a time."""
    rows, values, latents = len(code.values), code.values.detach(), code.indices.long()
    for start in range(0, code.d_sae, TILE):
        width = min(TILE, code.d_sae - start)
        row, slot = ((latents >= start) & (latents < start + width)).nonzero(as_tuple=True)
        place = row * width + latents[row, slot] - start
        yield values.new_zeros(rows * width).index_add_(0, place, values[row, slot]).view(rows, width)


def _mid_ranks(tile: Tensor) -> Tensor:
    """The rank of every entry within its column, from 1, equal ones at their mean rank: [rows, m] float64."""
    ordered, order = tile.T.contiguous().sort(dim=1)
    n = ordered.shape[1]
    place = torch.arange(n, dtype=torch.int32, device=tile.device)
    new = ordered[:, 1:] != ordered[:, :-1]
    if bool(new.all()):
        rank = (place + 1).double().expand_as(ordered)
    else:
        edge = new.new_ones(len(new), min(n, 1))
        first = torch.where(torch.cat([edge, new], 1), place, 0).cummax(1).values
        last = torch.where(torch.cat([new, edge], 1), place, n).flip(1).cummin(1).values.flip(1)
        rank = (first + last).double() / 2 + 1
    return torch.empty(ordered.shape, dtype=torch.float64, device=tile.device).scatter_(1, order, rank).T


def _check_tile(op: str, tile: Tensor, rows: int) -> None:
    _checks.tensor(op, "tile", tile, 2)
    _checks.floating(op, tile=tile)
    if len(tile) != rows:
        raise ValueError(f"{op}: a tile {tuple(tile.shape)} must have a row per row of labels, {rows}")
    if not bool(tile.isfinite().all()):
        raise ValueError(f"{op}: a tile holds NaN or Inf in row {int((~tile.isfinite()).any(1).nonzero()[0])}")
