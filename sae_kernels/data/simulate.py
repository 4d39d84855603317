"""A simulated catalogue with planted concepts: in the items, in the users' tastes and in the order of their choices."""

import torch
from torch import Tensor

from .interactions import Concepts, Interactions

NAMES = (
    "adventure", "baking", "chess", "desert", "espionage", "folklore", "gardens", "heist", "islands", "jazz",
    "knights", "lighthouse", "mountains", "noir", "opera", "pirates", "quests", "romance", "space", "trains",
    "undersea", "vampires", "western", "youth",
)  # fmt: skip
GROUP = 4
TRIES = 6


def simulate(
    n_users: int = 4000,
    n_items: int = 1500,
    n_concepts: int = 20,
    seed: int = 0,
    *,
    mean_length: float = 30.0,
    popularity: float = 0.6,
    taste: float = 2.5,
    order: float = 0.6,
    concepts_per_item: tuple[int, int] = (1, 3),
) -> Interactions:
    """Users who pick items by concept, in sequence; the truth comes back in .concepts, .user_taste and .transitions.

    Items carry 1 to 3 concepts, mostly of one group of four (concepts co-occur), and a Zipf popularity: weight
    rank^-popularity. A user's taste is a softmax over concepts, sharper with `taste`, correlated within a group. The
    next item's concept follows the last one's row of .transitions (stay, or move on to the next of its group) with
    chance `order`, else the user's taste; within a concept items are drawn by popularity, never twice. Lengths are
    log-normal about mean_length, at least 5. .order is the place in the sequence. The same arguments give the same
    data.
    """
    _check(n_users, n_items, n_concepts, mean_length, popularity, order, concepts_per_item)
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(n_concepts) // GROUP
    labels = _item_concepts(n_items, group, concepts_per_item, generator)
    rank = torch.randperm(n_items, generator=generator) + 1
    weight = rank.double().pow(-popularity)
    tastes = _tastes(n_users, group, taste, generator)
    transitions = _transitions(group)
    lengths = (torch.randn(n_users, generator=generator) * 0.5 - 0.125).exp().mul_(mean_length).round_().long()
    lengths = lengths.clamp(min=min(5, n_items), max=max(n_items // 2, 1))
    users, items, places = _walk(labels, weight, tastes, transitions, lengths, order, generator)
    names = [NAMES[c] if c < len(NAMES) else f"concept {c}" for c in range(n_concepts)]
    titles = [f"{', '.join(names[c] for c in row.nonzero().squeeze(1).tolist())} #{i}" for i, row in enumerate(labels)]
    return Interactions(
        name=f"simulated (seed {seed})",
        users=users,
        items=items,
        user_ids=list(range(n_users)),
        item_ids=list(range(n_items)),
        order=places,
        item_titles=titles,
        concepts=Concepts(names, labels),
        user_taste=tastes,
        transitions=transitions,
    )


def _item_concepts(n_items: int, group: Tensor, count: tuple[int, int], generator: torch.Generator) -> Tensor:
    """[n_items, n_concepts] bool. First concepts go round, so that each has its share; the others prefer its group."""
    n_concepts = group.numel()
    first = torch.arange(n_items)[torch.randperm(n_items, generator=generator)] % n_concepts
    extra = torch.randint(count[0] - 1, count[1], (n_items,), generator=generator).clamp(max=n_concepts - 1)
    chance = torch.where(group[first].unsqueeze(1) == group, 8.0, 1.0)
    chance[torch.arange(n_items), first] = 0
    labels = torch.zeros(n_items, n_concepts, dtype=torch.bool)
    labels[torch.arange(n_items), first] = True
    most = int(extra.max()) if n_items else 0
    if most:
        others = chance.multinomial(most, generator=generator)
        wanted = torch.arange(most) < extra.unsqueeze(1)
        labels[torch.arange(n_items).unsqueeze(1).expand_as(others)[wanted], others[wanted]] = True
    return labels


def _tastes(n_users: int, group: Tensor, sharpness: float, generator: torch.Generator) -> Tensor:
    """[n_users, n_concepts], rows sum to 1: half of the variance of a taste is shared by the concepts of a group."""
    of_group = torch.randn(n_users, int(group.max()) + 1, generator=generator)[:, group]
    of_concept = torch.randn(n_users, group.numel(), generator=generator)
    return ((of_group + of_concept) * (sharpness * 0.5**0.5)).softmax(1)


def _transitions(group: Tensor) -> Tensor:
    """[n_concepts, n_concepts], rows sum to 1: stay with 0.5, the next concept of the group with 0.4, any with 0.1."""
    n_concepts = group.numel()
    eye = torch.eye(n_concepts)
    first = torch.arange(n_concepts) // GROUP * GROUP
    size = group.bincount()[group]
    follower = first + (torch.arange(n_concepts) - first + 1) % size
    return 0.5 * eye + 0.4 * eye[follower] + 0.1 / n_concepts


def _walk(labels, weight, tastes, transitions, lengths, order, generator) -> tuple[Tensor, Tensor, Tensor]:
    """All users step together; an item that the user has is drawn again, up to TRIES times, else the step is lost."""
    n_users, (n_items, n_concepts) = lengths.numel(), labels.shape
    concept_of, item_of = labels.T.nonzero().unbind(1)
    # one running sum over the items of concept 0, then 1, ...: a uniform number in a concept's span draws an item
    edges = weight[item_of].cumsum(0)
    ends = edges[concept_of.bincount(minlength=n_concepts).cumsum(0) - 1]
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    had = torch.zeros(n_users, n_items, dtype=torch.bool)
    last = torch.full((n_users,), -1)
    out = []
    for place in range(int(lengths.max()) if n_users else 0):
        active = (place < lengths).nonzero().squeeze(1)
        chance = tastes[active]
        follows = (last[active] >= 0) & (torch.rand(active.numel(), generator=generator) < order)
        chance[follows] = transitions[last[active][follows]]
        concept = chance.multinomial(1, generator=generator).squeeze(1)
        for _ in range(TRIES):
            span = torch.rand(active.numel(), dtype=torch.float64, generator=generator)
            drawn = torch.searchsorted(edges, starts[concept] + span * (ends - starts)[concept], right=True)
            drawn = item_of[drawn.clamp(max=item_of.numel() - 1)]
            fresh = ~had[active, drawn]
            users = active[fresh]
            had[users, drawn[fresh]] = True
            last[users] = concept[fresh]
            out.append((users, drawn[fresh], torch.full((users.numel(),), place)))
            active, concept = active[~fresh], concept[~fresh]
    if not out:
        return tuple(torch.zeros(0, dtype=torch.int64) for _ in range(3))
    return tuple(torch.cat(column) for column in zip(*out, strict=True))


def _check(n_users, n_items, n_concepts, mean_length, popularity, order, concepts_per_item) -> None:
    for name, value in (("n_users", n_users), ("n_items", n_items), ("n_concepts", n_concepts)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"simulate: {name} must be an int of at least 1, got {value!r}")
    if n_items < n_concepts:
        raise ValueError(f"simulate: every concept needs an item: n_items = {n_items} < n_concepts = {n_concepts}")
    low, high = concepts_per_item
    if not 1 <= low <= high:
        raise ValueError(f"simulate: concepts_per_item must be (low, high), 1 <= low <= high, got {concepts_per_item}")
    if not 0 <= order <= 1:
        raise ValueError(f"simulate: order must be in [0, 1], got {order}")
    if not mean_length >= 1:
        raise ValueError(f"simulate: mean_length must be at least 1, got {mean_length}")
    if not popularity >= 0:
        raise ValueError(f"simulate: popularity must be at least 0, got {popularity}")
