"""What a latent fires on: the codes of single items, and the top examples with their titles."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..data.histories import Histories
from ..eval.ranking import evaluating
from ..nn.code import SparseCode
from ..ops.activation_stats import ActivationStats


@dataclass(frozen=True)
class Example:
    """A row on which a latent fires: its id, its title, the value."""

    id: int
    title: str
    value: float


@torch.no_grad()
def item_codes(model: nn.Module, sae: nn.Module, n_items: int | None = None, *, batch_size: int = 1024) -> SparseCode:
    """The SAE's codes of all items, each as a history of one: values and indices [n_items, k], on the SAE's device.

    model: a recommender of sae_kernels.recommenders, or any module with encode_histories(flat, offsets) -> [B, d_in];
    sae: a module with encode(x) -> SparseCode. n_items: model.n_items where None. Both run in eval mode, in batches.
    """
    if not hasattr(model, "encode_histories"):
        raise TypeError(f"item_codes: model must have encode_histories(flat, offsets); {type(model).__name__} has not")
    n_items = model.n_items if n_items is None else n_items
    items = Histories.one_item_each(n_items)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    parts = []
    with evaluating(model), evaluating(sae):
        for rows in torch.arange(n_items).split(batch_size):
            parts.append(sae.encode(model.encode_histories(*(t.to(device) for t in items.bags(rows)))))
    if not parts:
        raise ValueError(f"item_codes: n_items must be at least 1, got {n_items}")
    values, indices = (torch.cat([getattr(part, name) for part in parts]) for name in ("values", "indices"))
    return SparseCode(values, indices, parts[0].d_sae)


def latent_examples(
    stats: ActivationStats, titles: Sequence[str], latents: Iterable[int] | None = None
) -> dict[int, list[Example]]:
    """The top examples of the given latents (of all that fired, where None), best first; ids are places in titles.

    Raises ValueError where stats keeps no examples, an id has no title, or a latent is outside [0, d_sae).
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
        found[f] = [Example(i, titles[i], value) for i, value in zip(ids, values, strict=True)]
    return found
