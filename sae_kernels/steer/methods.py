"""Ways to steer, each as strength in [0, 1] -> lists: by latents, and what there is without a SAE to compare with."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..data.histories import Histories
from .edits import SHARPNESS, Latents, favourites, mix, mix_liked, mix_near
from .evaluate import Lists
from .goals import Goals
from .serve import ItemHead, SteeredRanker, Users, rank_unseen


def latent_lists(
    ranker: SteeredRanker,
    users: Users,
    goals: Goals,
    latents: Mapping[int, Latents] | Sequence[Latents],
    k: int = 20,
    weights: Mapping[int, Sequence[float]] | Sequence[Sequence[float]] | None = None,
    *,
    near: str | None = None,
) -> Lists:
    """mix(latents of the user's concept, strength, weights), by the concept's place in goals.names.

    near: "user" for mix_near; "liked" for mix_liked, to the items that have the concept in goals.labels.
    """
    if near not in (None, "user", "liked"):
        raise ValueError(f"latent_lists: near must be None, 'user' or 'liked', got {near!r}")
    if near == "liked":
        _linear("latent_lists(near='liked')", ranker)

    def one(part: Users, concept: int, strength: float) -> Tensor:
        worth = None if weights is None else weights[concept]
        if near == "user":
            edit = mix_near(latents[concept], strength, ranker.sae.W_dec, worth)
        elif near == "liked":
            edit = mix_liked(latents[concept], strength, ranker.sae, _items_of(ranker, goals, concept), worth)
        else:
            edit = mix(latents[concept], strength, worth)
        return ranker.rank(part, k, edit)[0]

    return _by_goal(users, goals, k, one)


def liked_lists(
    ranker: SteeredRanker, users: Users, goals: Goals, k: int = 20, *, sharpness: float = SHARPNESS
) -> Lists:
    """No SAE: h -> (1 - strength) h + strength |h| t / |t|, t = favourites(h, the concept's items, sharpness).

    What mix_liked goes after, without latents between: what the latents are worth there shows beside it.
    """
    _linear("liked_lists", ranker)

    def one(part: Users, concept: int, strength: float) -> Tensor:
        items = _items_of(ranker, goals, concept)

        def states(rows: Tensor) -> Tensor:
            h = part.x[rows]
            return _towards(h, favourites(h, items, sharpness), strength)

        return rank_unseen(states, ranker.head, part.histories, k)[0]

    return _by_goal(users, goals, k, one)


def probe_lists(ranker: SteeredRanker, users: Users, goals: Goals, probes: Tensor, k: int = 20) -> Lists:
    """No SAE: h -> (1 - strength) h + strength |h| w / |w|, w the user's concept's row of probes [n_concepts, d]."""
    if probes.shape != (len(goals.names), users.x.shape[1]):
        expected = f"[{len(goals.names)} concepts, {users.x.shape[1]}]"
        raise ValueError(f"probe_lists: probes must be {expected}, got {tuple(probes.shape)}")
    unit = normalize(probes.to(users.x), dim=1)

    def one(part: Users, concept: int, strength: float) -> Tensor:
        def states(rows: Tensor) -> Tensor:
            return _towards(part.x[rows], unit[concept], strength)

        return rank_unseen(states, ranker.head, part.histories, k)[0]

    return _by_goal(users, goals, k, one)


def rerank_lists(ranker: SteeredRanker, users: Users, goals: Goals, k: int = 20) -> Lists:
    """No SAE: the scores of the concept's items rise by strength / (1 - strength) standard deviations of the user's.

    At strength 1 all of them stand before all others, in the model's own order.
    """
    items, bias = ranker.head.items, ranker.head.bias
    # the bonus is one more dimension: of the items whether they are members, of the user how much that is worth
    wide = torch.cat([items, items.new_zeros(len(items), 1)], 1)
    centred = items.double() - items.double().mean(0)
    covariance = centred.T @ centred / len(items)
    cross = None if bias is None else centred.T @ (bias.double() - bias.double().mean()) / len(items)

    def spread(query: Tensor) -> Tensor:
        q = query.double()
        variance = ((q @ covariance) * q).sum(1)
        if bias is not None:
            variance = variance + 2 * q @ cross + bias.double().var(correction=0)
        return variance.clamp(min=0).sqrt().to(query)

    def one(part: Users, concept: int, strength: float) -> Tensor:
        if strength == 1:
            return _members_first(ranker.head, part, goals.labels[:, concept], k)
        wide[:, -1] = goals.labels[:, concept].to(wide)

        def states(rows: Tensor) -> Tensor:
            query = part.x[rows] if ranker.head.query is None else ranker.head.query(part.x[rows])
            return torch.cat([query, strength / (1 - strength) * spread(query).unsqueeze(1)], 1)

        return rank_unseen(states, ItemHead(wide, bias), part.histories, k)[0]

    return _by_goal(users, goals, k, one)


def _members_first(head: ItemHead, users: Users, members: Tensor, k: int) -> Tensor:
    """The k best unseen items [n_users, k], those of members [n_items] bool first; -1 where none is left."""
    lists = []
    for items in (members.nonzero().squeeze(1), (~members).nonzero().squeeze(1)):
        if len(items) == 0:
            continue
        place = torch.full_like(members, -1, dtype=torch.int64)
        place[items] = torch.arange(len(items))
        had = users.histories.filter(place[users.histories.flat] >= 0)
        own = ItemHead(head.items[items], None if head.bias is None else head.bias[items], head.query)
        histories = Histories(place[had.flat], had.offsets, len(items))
        found = rank_unseen(lambda rows: users.x[rows], own, histories, min(k, len(items)))[0]
        lists.append(torch.where(found < 0, -1, items[found]))
    best = torch.cat(lists, 1)
    return best.gather(1, (best < 0).long().argsort(dim=1, stable=True)[:, :k])


def linear_probes(x: Tensor, labels: Tensor, ridge: float = 1.0) -> Tensor:
    """What tells each concept's rows from the others, by ridge regression: [n_concepts, d] float64, of norm 1.

    x [rows, d]: embeddings of items; labels [rows, n_concepts] bool. ridge: in units of the mean variance of x; a large
    one gives the difference of the means. Rows of zeros for concepts that all rows or none have.
    """
    if labels.dtype != torch.bool or labels.dim() != 2 or len(labels) != len(x):
        came = f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"linear_probes: labels must be bool, a row per row of x {tuple(x.shape)}, got {came}")
    if not ridge >= 0:
        raise ValueError(f"linear_probes: ridge must be at least 0, got {ridge}")
    centred, y = x.double() - x.double().mean(0), labels.double()
    covariance = centred.T @ centred / len(x)
    covariance = covariance + ridge * covariance.diagonal().mean() * torch.eye(x.shape[1], dtype=torch.float64)
    return normalize(torch.linalg.solve(covariance, centred.T @ (y - y.mean(0)) / len(x)).T, dim=1)


def _towards(h: Tensor, target: Tensor, strength: float) -> Tensor:
    """From h towards the target's direction, at the length of h."""
    return (1 - strength) * h + strength * h.norm(dim=-1, keepdim=True) * normalize(target, dim=-1)


def _items_of(ranker: SteeredRanker, goals: Goals, concept: int) -> Tensor:
    return ranker.head.items[goals.labels[:, concept]]


def _linear(op: str, ranker: SteeredRanker) -> None:
    if not ranker.head.linear:
        raise ValueError(f"{op}: the head of {type(ranker.model).__name__} is not linear in the embedding")


def _by_goal(users: Users, goals: Goals, k: int, one: Callable[[Users, int, float], Tensor]) -> Lists:
    if len(goals.concept) != len(users):
        raise ValueError(f"{len(goals.concept)} goals and {len(users)} users; they must be of the same users")
    parts = [(concept, rows, users.select(rows)) for concept, rows in goals.groups()]

    def lists_at(strength: float) -> Tensor:
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be between 0 and 1, got {strength}")
        top = torch.empty(len(users), k, dtype=torch.int64)
        for concept, rows, part in parts:
            top[rows] = one(part, concept, strength)
        return top

    return lists_at
