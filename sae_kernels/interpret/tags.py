"""Concepts from any table of items and tags; what the table and the catalogue do not share is counted."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.interactions import Concepts
from ..ops import _checks


@dataclass(frozen=True)
class TagTable:
    """concepts: labels of all items; weights [n_items, n_concepts] float32: summed counts, for concept_tfidf.

    unknown_items: rows of the table whose item is not in the catalogue; untagged_items: items without a kept tag;
    rare_tags: tag -> its number of items, of those left out.
    """

    concepts: Concepts
    weights: Tensor
    unknown_items: int
    untagged_items: int
    rare_tags: dict[str, int]

    def describe(self) -> str:
        """One line with the counts of what is in and what is left out."""
        n_items, n_tags = self.weights.shape
        return (
            f"{n_tags} tags on {n_items:,} items; left out: {len(self.rare_tags)} tags with too few items, "
            f"{self.unknown_items:,} rows of unknown items; {self.untagged_items:,} items have no tag"
        )


def tag_table(
    items: Sequence[Hashable],
    tags: Sequence[str],
    catalogue: Sequence[Hashable],
    *,
    counts: Sequence[float] | None = None,
    min_items: int = 5,
    min_count: float = 1,
) -> TagTable:
    """Row r says that items[r] has tags[r], counts[r] times; catalogue: the item ids by code (Interactions.item_ids).

    An item has a tag where their counts sum to min_count or more; a tag with fewer than min_items items is left out.
    Raises TypeError for a tag that is no text, such as a missing one; ValueError where the lengths differ, a count is
    negative or not finite, the catalogue names an item twice, or no tag is left.
    """
    # the entries of a tensor are tensors, each equal to itself alone
    items, catalogue = (ids.tolist() if isinstance(ids, Tensor) else list(ids) for ids in (items, catalogue))
    tags = list(tags)
    counts = [1.0] * len(items) if counts is None else [float(count) for count in counts]
    if not len(items) == len(tags) == len(counts):
        raise ValueError(f"tag_table: {len(items)} items, {len(tags)} tags and {len(counts)} counts; expected one each")
    _checks.integer("tag_table", "min_items", min_items, 1, 2**62)
    bad = [count for count in counts if not 0 <= count < float("inf")]
    if bad:
        raise ValueError(f"tag_table: counts must be finite and not negative, got {bad[0]}")
    no_text = [row for row, tag in enumerate(tags) if not isinstance(tag, str)]
    if no_text:
        raise TypeError(f"tag_table: tags must be texts, row {no_text[0]} has {tags[no_text[0]]!r}")
    code = {item: place for place, item in enumerate(catalogue)}
    if len(code) < len(catalogue):
        twice = next(item for place, item in enumerate(catalogue) if code[item] != place)
        raise ValueError(f"tag_table: the catalogue names item {twice!r} twice")
    names = sorted(set(tags))
    column = {name: place for place, name in enumerate(names)}
    known = [row for row, item in enumerate(items) if item in code]
    # summed per pair before anything dense: most of the tags of a shelf table are too rare to stay
    pairs = torch.tensor([code[items[row]] * len(names) + column[tags[row]] for row in known], dtype=torch.int64)
    pairs, place = pairs.unique(return_inverse=True)
    total = torch.zeros(pairs.numel(), dtype=torch.float64)
    total.index_add_(0, place, torch.tensor([counts[row] for row in known], dtype=torch.float64))
    enough = (total >= min_count) & (total > 0)
    pairs, total = pairs[enough], total[enough]
    support = torch.bincount(pairs % max(len(names), 1), minlength=len(names))
    kept = support >= min_items
    if not bool(kept.any()):
        raise ValueError(
            f"tag_table: none of the {len(names)} tags has {min_items} of the {len(code):,} items of the catalogue; "
            f"{len(items) - len(known):,} of {len(items):,} rows name unknown items"
        )
    rare = {name: int(n) for name, n, keep in zip(names, support, kept, strict=True) if not keep}
    inside = kept[pairs % len(names)]
    weights = torch.zeros(len(code), int(kept.sum()), dtype=torch.float32)
    where = kept.cumsum(0)[pairs[inside] % len(names)] - 1
    weights[pairs[inside] // len(names), where] = total[inside].float()
    concepts = Concepts([name for name in names if name not in rare], weights > 0)
    untagged = int((weights == 0).all(1).sum())
    return TagTable(concepts, weights, len(items) - len(known), untagged, rare)
