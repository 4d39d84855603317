"""What a latent fires on: the codes of single items, and the top examples with their titles."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._modules import evaluating
from ..data.histories import Histories
from ..nn.code import SparseCode
from ..ops.activation_stats import ActivationStats


@dataclass(frozen=True)
class Example:
    """A row on which a latent fires: its id, its title, the value."""

    id: int
    title: str
    value: float


@torch.no_grad()
def item_embeddings(model: nn.Module, n_items: int | None = None, *, batch_size: int = 1024) -> Tensor:
    """What the model makes of a history of one item, for every item: [n_items, d]; nothing is items x items.

    model: a recommender of sae_kernels.recommenders, or any module with encode_histories(flat, offsets) -> [B, d].
    n_items: model.n_items where None. The model runs in eval mode, in batches.
    """
    if not hasattr(model, "encode_histories"):
        came = type(model).__name__
        raise TypeError(f"item_embeddings: model must have encode_histories(flat, offsets); {came} has not")
    n_items = model.n_items if n_items is None else n_items
    if n_items < 1:
        raise ValueError(f"item_embeddings: n_items must be at least 1, got {n_items}")
    items = Histories.one_item_each(n_items)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model):
        batches = (items.bags(rows) for rows in torch.arange(n_items).split(batch_size))
        return torch.cat([model.encode_histories(*(t.to(device) for t in batch)) for batch in batches])


@torch.no_grad()
def item_codes(model: nn.Module, sae: nn.Module, n_items: int | None = None, *, batch_size: int = 1024) -> SparseCode:
    """The SAE's codes of all items, each as a history of one: values and indices [n_items, k], on the SAE's device.

    sae: a module with encode(x) -> SparseCode; it runs in eval mode. The rest as item_embeddings.
    """
    x = item_embeddings(model, n_items, batch_size=batch_size)
    with evaluating(sae):
        parts = [sae.encode(rows) for rows in x.split(batch_size)]
    values, indices = (torch.cat([getattr(part, name) for part in parts]) for name in ("values", "indices"))
    return SparseCode(values, indices, parts[0].d_sae)


def latent_examples(
    stats: ActivationStats, titles: Sequence[str], latents: Iterable[int] | None = None, distinct: int | None = None
) -> dict[int, list[Example]]:
    """The top examples of the given latents (of all that fired, where None), best first; ids are places in titles.

    distinct: each id once, at its largest value, and at most so many: the same item stands at many positions. Raises
    ValueError where stats keeps no examples, an id has no title, or a latent is outside [0, d_sae).
    """
    if stats.top_ids is None:
        raise ValueError("latent_examples: stats keeps no examples; make it with ActivationStats(d_sae, top=n)")
    chosen = (stats.counts > 0).nonzero().squeeze(1).tolist() if latents is None else [int(f) for f in latents]
    found = {}
    for f in chosen:
        if not 0 <= f < stats.d_sae:
            raise ValueError(f"latent_examples: latents must be in [0, d_sae = {stats.d_sae}), got {f}")
        n = min(int(stats.counts[f]), stats.top_ids.shape[1])
        ids, values = stats.top_ids[f, :n].tolist(), stats.top_values[f, :n].tolist()
        outside = [i for i in ids if not 0 <= i < len(titles)]
        if outside:
            raise ValueError(f"latent_examples: id {outside[0]} of latent {f} has no title among the {len(titles)}")
        shown = list(zip(ids, values, strict=True))
        if distinct is not None:
            shown = sorted(dict(reversed(shown)).items(), key=lambda pair: (-pair[1], pair[0]))[:distinct]
        found[f] = [Example(i, titles[i], value) for i, value in shown]
    return found
