"""Why an item was recommended: the latents that carried its score, and where it would stand without each of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._modules import evaluating
from ..nn import SparseCode
from ..ops import _checks
from ..steer.edits import suppress
from ..steer.serve import ItemHead, SteeredRanker, Users
from .examples import Example

TILE = 2**16  # items scored at once for a rank


@dataclass(frozen=True)
class Reason:
    """A latent's part in a score. contribution: what it adds; rank_without: the item's rank were the latent silent.

    evidence: items of the user's history that fire the latent by themselves, the strongest first.
    """

    latent: int
    name: str | None
    activation: float
    contribution: float
    rank_without: int
    evidence: list[Example]


@dataclass(frozen=True)
class Explanation:
    """score = sum of all contributions + constant + left_out + unexplained, for one user and one item.

    rank: 1 for the best unseen item. reasons: the latents of largest |contribution|; others: the sum of the remaining
    ones. constant: decoder bias, normaliser and item bias; left_out: what the SAE does not reconstruct, 0 unless the
    ranker has error_term. exact: the head is linear in the embedding, so that unexplained is rounding alone;
    otherwise contributions are of first order about the user's embedding, and unexplained is what that misses. The
    normaliser's scale and offset, which depend on the user, are taken as given.
    """

    item: int
    title: str
    rank: int
    score: float
    reasons: list[Reason]
    others: float
    constant: float
    left_out: float
    unexplained: float
    exact: bool

    def text(self) -> str:
        """A few lines for people."""
        how = "exactly" if self.exact else "to first order"
        lines = [f"{self.title}: rank {self.rank}, score {self.score:.4g}, {how} the sum of"]
        for reason in self.reasons:
            name = f"latent {reason.latent}" + (f" ({reason.name})" if reason.name else "")
            because = f", as in {'; '.join(example.title for example in reason.evidence)}" if reason.evidence else ""
            move = f"rank {self.rank} -> {reason.rank_without} without it"
            lines.append(f"  {reason.contribution:+.4g}  {name}{because}; {move}")
        rest = {"other latents": self.others, "constant": self.constant, "not in the SAE": self.left_out}
        if not self.exact:
            rest["beyond first order"] = self.unexplained
        return "\n".join([*lines, *(f"  {value:+.4g}  {name}" for name, value in rest.items() if value)])


@torch.no_grad()
def explain(
    ranker: SteeredRanker,
    users: Users,
    row: int,
    item: int,
    *,
    names: Mapping[int, str] | None = None,
    items: SparseCode | None = None,
    titles: Sequence[str] | None = None,
    top: int = 5,
    evidence: int = 3,
) -> Explanation:
    """Explains the score of one unseen item for one of the users (`ranker.encode(histories)`).

    names: latent -> concept, such as {f: c.concept for f, c in name_latents(...).items()}. items: `item_codes(model,
    sae)`, for the evidence; none is given without. top: reasons; evidence: items per reason. Raises ValueError for a
    row or item that is not there, and for an item of the user's history.
    """
    op = "explain"
    _checks.integer(op, "row", row, 0, len(users) - 1)
    _checks.integer(op, "item", item, 0, users.histories.n_items - 1)
    _checks.integer(op, "top", top, 0, 2**31)
    titles = [str(i) for i in range(users.histories.n_items)] if titles is None else titles
    if len(titles) != users.histories.n_items:
        raise ValueError(f"{op}: titles must be one per item, {users.histories.n_items}, got {len(titles)}")
    history = users.histories[row]
    if bool((history == item).any()):
        raise ValueError(f"{op}: item {item} ({titles[item]!r}) is in the history of user row {row}")
    user = users.select(torch.tensor([row]))
    with evaluating(ranker.model), evaluating(ranker.sae):
        h = ranker.states(user)
        slope, score = _slope(ranker.head, h[0], item)
        latents, activations, contributions, constant = _attributed(ranker, user.code, slope)
        order = contributions.abs().argsort(descending=True, stable=True)
        order, remaining = order[:top], order[top:]
        edited = [ranker.states(user, suppress(int(latents[f]))) for f in order]
        ranks = _ranks(torch.cat([h, *edited]), ranker.head, item, history)
    bias = 0.0 if ranker.head.bias is None else float(ranker.head.bias[item])
    # the first-order part about h, and what the head's own curve and bias add
    left_out = float(slope @ (user.x - ranker.sae.decode(user.code))[0].double()) if ranker.error_term else 0.0
    linear = float(contributions.sum()) + constant + left_out
    constant += bias
    reasons = [
        Reason(
            latent=int(latents[f]),
            name=None if names is None else names.get(int(latents[f])),
            activation=float(activations[f]),
            contribution=float(contributions[f]),
            rank_without=rank,
            evidence=_evidence(items, int(latents[f]), history, titles, evidence),
        )
        for f, rank in zip(order.tolist(), ranks[1:], strict=True)
    ]
    return Explanation(
        item=item,
        title=titles[item],
        rank=ranks[0],
        score=score,
        reasons=reasons,
        others=float(contributions[remaining].sum()),
        constant=constant,
        left_out=left_out,
        unexplained=score - bias - linear,
        exact=ranker.head.linear,
    )


def _slope(head: ItemHead, h: Tensor, item: int) -> tuple[Tensor, float]:
    """The gradient [d] float64 of the item's score by the embedding h [d], and the score."""
    bias = 0.0 if head.bias is None else float(head.bias[item])
    if head.linear:
        slope = head.items[item].double()
        return slope, float(slope @ h.double()) + bias
    with torch.enable_grad():
        at = h.detach().clone().requires_grad_()
        score = (head.query(at.unsqueeze(0))[0] * head.items[item]).sum()
        (slope,) = torch.autograd.grad(score, at)
    return slope.double(), float(score.detach()) + bias


def _attributed(ranker: SteeredRanker, code: SparseCode, slope: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """(latents, activations, contributions, constant) of the one row of the code: what each adds along the slope."""
    fires = code.values[0] != 0
    latents, place = code.indices[0][fires].long().unique(return_inverse=True)
    activations = torch.zeros(latents.numel(), dtype=torch.float64).index_add_(0, place, code.values[0][fires].double())
    scale, offset = (None if t is None else (t[0] if t.dim() > 1 else t).double() for t in (code.scale, code.offset))
    scaled = slope if scale is None else slope * scale
    contributions = activations * (ranker.sae.W_dec[latents].double() @ scaled)
    constant = float(ranker.sae.b_dec.double() @ scaled)
    if offset is not None:
        constant += float((offset * slope).sum())
    return latents, activations, contributions, constant


def _ranks(h: Tensor, head: ItemHead, item: int, history: Tensor) -> list[int]:
    """The item's rank among the unseen items for every state of h [m, d], 1 for the best, lower items first in ties."""
    query = h if head.query is None else head.query(h)
    own, before = None, torch.zeros(len(h), dtype=torch.int64)
    tiles = list(torch.arange(head.items.shape[0]).split(TILE))
    tiles.sort(key=lambda tile: not int(tile[0]) <= item <= int(tile[-1]))  # the item's own tile first
    for tile in tiles:
        scores = query @ head.items[tile].T
        scores = scores if head.bias is None else scores + head.bias[tile]
        # its score from the same product as the others', so that ties are ties
        own = scores[:, item - int(tile[0]), None].clone() if own is None else own
        ahead = (scores > own) | ((scores == own) & (tile < item))
        ahead[:, torch.isin(tile, history)] = False
        before += ahead.sum(1)
    return (before + 1).tolist()


def _evidence(
    items: SparseCode | None, latent: int, history: Tensor, titles: Sequence[str], count: int
) -> list[Example]:
    if items is None:
        return []
    own = history.unique()
    strength = torch.where(items.indices[own] == latent, items.values[own], 0).sum(1)
    order = strength.argsort(descending=True, stable=True)[:count]
    return [Example(int(own[i]), titles[int(own[i])], float(strength[i])) for i in order if strength[i] > 0]
