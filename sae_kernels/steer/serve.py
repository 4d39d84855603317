"""Steered serving: encode, edit, decode, score and rank for a batch of users, without rows x d_sae or rows x items."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .._modules import evaluating
from ..data.histories import Histories
from ..nn import SparseCode, TopKSAE
from ..ops import _checks
from ..ops.topk_encode import topk_encode
from .edits import Edit


@dataclass(frozen=True)
class ItemHead:
    """scores [B, n_items] = query(h) @ items.T + bias; items [n_items, d], bias [n_items] or None, query or None."""

    items: Tensor
    bias: Tensor | None = None
    query: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "ItemHead":
        """That of a model with item_head() -> (query, items, bias), as those of sae_kernels.recommenders have."""
        if not hasattr(model, "item_head"):
            name = type(model).__name__
            raise TypeError(f"ItemHead.of: {name} has no item_head(); make ItemHead(items, bias, query) yourself")
        with torch.no_grad():
            query, items, bias = model.item_head()
            return cls(items.detach().contiguous(), None if bias is None else bias.detach(), query)

    @property
    def linear(self) -> bool:
        """Whether the score is linear in h, so that attributions to latents are exact."""
        return self.query is None


@dataclass(frozen=True)
class Users:
    """Users as the SAE sees them: histories, their embeddings x [n_users, d_in] and the codes of x."""

    histories: Histories
    x: Tensor
    code: SparseCode

    def __len__(self) -> int:
        return len(self.histories)

    def select(self, rows: Tensor) -> "Users":
        """The users `rows` [B] int64, in that order."""
        return Users(self.histories.select(rows), self.x[rows], code_rows(self.code, rows))


class SteeredRanker:
    """A recommender with a SAE at the embedding that its item head reads.

    model: a recommender of sae_kernels.recommenders, or a module with encode_histories and item_head. The item
    embeddings are taken over once: make a new ranker when the model has changed. error_term: adds back what the SAE
    does not explain, so that without an edit the scores are the model's own. Raises ValueError naming both shapes where
    the SAE does not fit.
    """

    def __init__(
        self, model: nn.Module, sae: TopKSAE, *, error_term: bool = False, head: ItemHead | None = None
    ) -> None:
        if not hasattr(model, "encode_histories"):
            name = type(model).__name__
            raise TypeError(f"SteeredRanker: model must have encode_histories(flat, offsets); {name} has not")
        self.model, self.sae, self.error_term = model, sae, error_term
        self.head = ItemHead.of(model) if head is None else head
        self.device = self.head.items.device

    @torch.no_grad()
    def encode(self, histories: Histories, batch_size: int = 1024) -> Users:
        """The users' embeddings and codes. Raises ValueError for a user without a history."""
        if len(histories) == 0:
            raise ValueError("encode: there are no users")
        empty = histories.lengths == 0
        if bool(empty.any()):
            raise ValueError(f"encode: user row {int(empty.nonzero()[0])} has no history")
        with evaluating(self.model), evaluating(self.sae):
            batches = (histories.bags(rows) for rows in torch.arange(len(histories)).split(batch_size))
            parts = [self.model.encode_histories(*(t.to(self.device) for t in batch)) for batch in batches]
            x = torch.cat(parts)
            if x.dim() != 2 or x.shape[1] != self.sae.d_in:
                shapes = f"{tuple(x.shape)} must end in the SAE's d_in = {self.sae.d_in}"
                raise ValueError(f"encode: the embeddings of {type(self.model).__name__} {shapes}: not its bottleneck")
            return Users(histories, x, self.sae.encode(x))

    @torch.no_grad()
    def states(self, users: Users, edit: Edit | None = None) -> Tensor:
        """The steered embeddings [n_users, d_in]: decode(edit(code)), and what the SAE left out with error_term."""
        code = users.code if edit is None else edit(users.code)
        if not self.error_term:
            return self.sae.decode(code)
        return users.x if edit is None else users.x + self.sae.decode_difference(code, users.code)

    def rank(self, users: Users, n: int = 20, edit: Edit | None = None, batch_size: int = 512) -> tuple[Tensor, Tensor]:
        """The n best unseen items of every user, and their scores: both [n_users, n], best first.

        -1 and -inf where fewer are unseen; equal scores go to the lower item. The edit sees the users in batches of an
        order of its own choosing.
        """
        return rank_unseen(
            lambda rows: self.states(users.select(rows), edit), self.head, users.histories, n, batch_size
        )

    def recommend(self, histories: Histories, n: int = 20, edit: Edit | None = None) -> tuple[Tensor, Tensor]:
        """encode and rank in one: (items, scores), both [n_users, n]."""
        return self.rank(self.encode(histories), n, edit)


@torch.no_grad()
def rank_unseen(
    states: Callable[[Tensor], Tensor], head: ItemHead, histories: Histories, n: int, batch_size: int = 512
) -> tuple[Tensor, Tensor]:
    """(items, scores) [n_users, n] for the states [B, d] of user rows [B]: see SteeredRanker.rank.

    The n + (longest history) best of all items hold the n best unseen ones: they come from topk_encode, which never
    writes scores of all items, and the seen ones are dropped. Users go in order of their histories' length, so that a
    long one costs only its own batch. Raises ValueError for n outside [1, n_items] and for scores that are NaN.
    """
    n_items = head.items.shape[0]
    _checks.integer("rank", "n", n, 1, n_items)
    _checks.integer("rank", "batch_size", batch_size, 1, 2**31)
    if histories.n_items != n_items:
        raise ValueError(f"rank: the head has {n_items} items and the histories {histories.n_items}")
    items = torch.empty(len(histories), n, dtype=torch.int64)
    scores = torch.empty(len(histories), n, dtype=head.items.dtype)
    lengths = histories.lengths
    for rows in lengths.argsort(stable=True).split(batch_size):
        query = states(rows) if head.query is None else head.query(states(rows))
        k = min(n_items, n + int(lengths[rows].max()))
        values, found = topk_encode(query, head.items, head.bias, k, activation="none")
        values, found = values.cpu(), found.cpu().long()
        if bool(values.isnan().any()):
            raise ValueError(f"rank: scores of user row {int(rows[values.isnan().any(1)][0])} are NaN")
        seen = _seen(found, histories.select(rows))
        # stable: the unseen come first, in their order
        order = seen.long().argsort(dim=1, stable=True)[:, :n]
        gone = seen.gather(1, order)
        items[rows] = found.gather(1, order).masked_fill(gone, -1)
        scores[rows] = values.gather(1, order).masked_fill(gone, -torch.inf)
    return items, scores


def _seen(found: Tensor, histories: Histories) -> Tensor:
    """[B, k] bool: which of the found items [B, k] stand in the user's history."""
    had = histories.row_ids() * histories.n_items + histories.flat
    return torch.isin(torch.arange(len(found)).unsqueeze(1) * histories.n_items + found, had)


def code_rows(code: SparseCode, rows: Tensor) -> SparseCode:
    """The given rows of a code [n, k]; terms of the normaliser that all rows share stay."""

    def take(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.dim() < 2 else t[rows]

    part = code.replace(values=code.values[rows], indices=code.indices[rows])
    return replace(part, offset=take(code.offset), scale=take(code.scale))
