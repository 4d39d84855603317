"""What steering does to recommendations: more of the concept, at what cost for the user, and against what else."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace

from torch import Tensor, nn

from ..data.histories import Histories
from ..eval.lists import list_figures, means_and_errors
from ..eval.ranking import Scorer, top_k_items
from ..hooks import attach
from .edits import Edit
from .goals import Goals, one_goal

Lists = Callable[[float], Tensor]  # strength -> lists [n_users, k] int64, best first, -1 for no item
STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class SteeringRow:
    """One method at one strength; means over the users, as list_figures and means_and_errors define them.

    ndcg, recall: against users' own targets. segment_ndcg, segment_recall: against all unseen items of the concept,
    over the users who have one. concept_share: of the listed items. diversity is NaN where no embeddings were given. k:
    length of the lists. errors: bootstrap standard error of every figure; 1.96 of them to either side are a 95 % band.
    """

    strength: float
    concept_share: float
    ndcg: float
    segment_ndcg: float
    k: int
    recall: float
    segment_recall: float
    novelty: float
    coverage: float
    gini: float
    diversity: float = float("nan")
    method: str = ""
    errors: dict[str, float] = field(default_factory=dict)


def attached(
    model: nn.Module, sae: nn.Module, name: str | None = None, **options: object
) -> Callable[[Edit | None], AbstractContextManager[nn.Module]]:
    """steered(edit): a context in which the model runs through the SAE with that edit; outside it, it is as before.

    name: the module to attach to, model.hook_point where None; options: those of `attach`, such as error_term=True or
    positions="last". The general way: any module, any position; SteeredRanker is the fast one.
    """
    where = getattr(model, "hook_point", None) if name is None else name
    if where is None:
        raise ValueError(f"attached: name must be given, {type(model).__name__} has no hook_point")

    @contextmanager
    def steered(edit: Edit | None) -> Iterator[nn.Module]:
        with attach(model, where, sae, edit=edit, **options):
            yield model

    return steered


def steering_table(
    steered: Callable[[Edit | None], AbstractContextManager[Scorer]],
    edit_at: Callable[[float], Edit],
    concept_items: Tensor | Sequence[int],
    histories: Histories,
    targets: Histories,
    *,
    strengths: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.5),
    k: int = 20,
    batch_size: int = 512,
    resamples: int = 0,
) -> list[SteeringRow]:
    """One row per strength: lists of k unseen items for all users, steered towards one concept.

    steered: edit -> context that gives a scorer as rank_metrics takes it; `attached(model, sae)` makes one. edit_at:
    strength -> edit, such as lambda alpha: mix(latents, alpha). concept_items: bool [n_items], or the codes of the
    items that have the concept. histories are masked from the lists; targets: the same users. Scores exist for one
    batch at a time. Raises TypeError or ValueError that names the argument.
    """
    goals = one_goal(concept_items, len(histories), histories.n_items)

    def lists_at(strength: float) -> Tensor:
        with steered(edit_at(strength)) as scorer:
            return top_k_items(scorer, histories, k, batch_size)

    return compare_steering({"": lists_at}, goals, histories, targets, strengths=strengths, resamples=resamples)


def compare_steering(
    methods: Mapping[str, Lists],
    goals: Goals,
    histories: Histories,
    targets: Histories,
    *,
    strengths: Sequence[float] | Mapping[str, Sequence[float]] = STRENGTHS,
    embeddings: Tensor | None = None,
    popularity: Tensor | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> list[SteeringRow]:
    """A row per method and strength, every method on the same users, goals and resamples.

    methods: name -> lists at a strength; see sae_kernels.steer.methods. strengths: for all, or per method. embeddings
    [n_items, d]: for the diversity within a list; popularity [n_items]: users per item, those of histories where None.
    """
    if not len(goals.concept) == len(histories) == len(targets):
        sizes = f"{len(goals.concept)} goals, {len(histories)} histories and {len(targets)} targets"
        raise ValueError(f"compare_steering: {sizes} must be of the same users")
    if popularity is None:
        popularity = histories.users_per_item()
    unseen, rows = goals.unseen(histories), []
    for name, lists_at in methods.items():
        for strength in strengths[name] if isinstance(strengths, Mapping) else strengths:
            top = lists_at(strength)
            per_user = list_figures(top, targets, goals.wanted(top), unseen, popularity, embeddings)
            means, errors = means_and_errors(per_user, top, histories.n_items, resamples, seed)
            rows.append(SteeringRow(strength, k=top.shape[1], method=name, errors=errors, **means))
    return rows


def pareto_front(rows: Sequence[SteeringRow], gain: str = "segment_ndcg", cost: str = "ndcg") -> list[SteeringRow]:
    """The rows that no other beats, none having both figures as high and one higher; `cost` falls, `gain` rises."""
    front: list[SteeringRow] = []
    best = -float("inf")
    for row in sorted(rows, key=lambda row: (-getattr(row, cost), -getattr(row, gain))):
        twin = front and getattr(row, cost) == getattr(front[-1], cost) and getattr(row, gain) == best
        if getattr(row, gain) > best or twin:
            front.append(row)
            best = getattr(row, gain)
    return front


def at_loss(rows: Sequence[SteeringRow], base: float, loss: float = 0.05) -> dict[str, SteeringRow]:
    """method -> its point of the highest segment_ndcg that keeps ndcg >= (1 - loss) * base; absent if none.

    Between two neighbouring strengths a method is taken to move by a straight line in all figures and errors, so that
    methods are compared at the loss itself and not at what a grid of strengths happens to hit.
    """
    if not 0 <= loss < 1:
        raise ValueError(f"at_loss: loss must be in [0, 1), got {loss}")
    floor, found = (1 - loss) * base, {}
    for method in dict.fromkeys(row.method for row in rows):
        own = sorted((row for row in rows if row.method == method), key=lambda row: row.strength)
        points = [row for row in own if row.ndcg >= floor]
        for one, other in zip(own, own[1:], strict=False):
            if min(one.ndcg, other.ndcg) < floor < max(one.ndcg, other.ndcg):
                points.append(_between(one, other, (one.ndcg - floor) / (one.ndcg - other.ndcg)))
        if points:
            found[method] = max(points, key=lambda row: row.segment_ndcg)
    return found


def _between(one: SteeringRow, other: SteeringRow, t: float) -> SteeringRow:
    """The point at t in [0, 1] of the way from one to the other."""

    def at(a: float, b: float) -> float:
        return a + t * (b - a)

    numbers = {f.name: at(getattr(one, f.name), getattr(other, f.name)) for f in fields(one) if f.type is float}
    errors = {name: at(value, other.errors[name]) for name, value in one.errors.items()}
    return replace(one, errors=errors, **numbers)
