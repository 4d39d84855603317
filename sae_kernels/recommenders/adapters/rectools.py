"""RecTools: SASRecModel and BERT4RecModel, fitted."""

from typing import Any

import torch
from torch import Tensor, nn

from .base import SequenceAdapter


def from_rectools(model: Any, *, hook_point: str = "transformer_layers") -> SequenceAdapter:
    """The adapter of a fitted SASRecModel or BERT4RecModel; codes go in the order of RecTools' own item ids.

    hook_point: a dotted name within model.torch_model. Raises TypeError for anything else, ValueError for a model that
    was not fitted.
    """
    preparator = getattr(model, "data_preparator", None)
    if preparator is None or not hasattr(preparator, "session_max_len"):
        raise TypeError(f"from_rectools: {type(model).__name__} is not a transformer model of RecTools")
    if not getattr(model, "is_fitted", False):
        raise ValueError(f"from_rectools: this {type(model).__name__} has not been fitted")
    return RecToolsSequence(model.torch_model, preparator, hook_point)


class RecToolsSequence(SequenceAdapter):
    """Tokens are RecTools' internal ids: padding, the mask where there is one, then the items."""

    def __init__(self, model: nn.Module, preparator: Any, hook_point: str) -> None:
        extra = preparator.extra_token_ids
        item_ids = list(preparator.get_known_item_ids())
        tokens = torch.as_tensor(preparator.get_known_items_sorted_internal_ids(), dtype=torch.int64)
        super().__init__(
            model,
            hook_point,
            len(item_ids),
            max_len=preparator.session_max_len,
            pad_token=int(extra["PAD"]),
            mask_token=int(extra["MASK"]) if "MASK" in extra else None,
            tokens=tokens,
            item_ids=item_ids,
        )

    def scores(self, tokens: Tensor) -> Tensor:
        items = self.model.item_model.get_all_embeddings()
        hidden = self.model.encode_sessions({"x": tokens}, items)
        return self.model.similarity_module(hidden[:, -1:], items)[:, 0]

    def item_head(self) -> tuple[None, Tensor, None]:
        """As that of our SASRec; ValueError for a hook point before the last states, or cosine similarity."""
        similarity = self.model.similarity_module
        if (
            self.hook_point != "model.transformer_layers"
            or getattr(getattr(similarity, "distance", None), "name", None) != "DOT"
        ):
            raise ValueError(f"item_head: items are not scored by a product with the output of {self.hook_point!r}")
        return None, self.model.item_model.get_all_embeddings()[self.token_of[1:]], None
