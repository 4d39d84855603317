"""Hugging Face transformers: GPT-2 and BERT style sequence models whose tokens are items."""

from collections.abc import Hashable, Sequence

from torch import Tensor, nn

from .base import SequenceAdapter

HEADS = ("lm_head", "cls", "predictions", "generator_lm_head")


def from_transformers(
    model: nn.Module,
    n_items: int,
    *,
    pad_token: int | None = None,
    mask_token: int | None = None,
    tokens: Tensor | None = None,
    max_len: int | None = None,
    hook_point: str | None = None,
    item_ids: Sequence[Hashable] | None = None,
) -> SequenceAdapter:
    """The adapter of a model with a language-modelling head over item tokens (GPT2LMHeadModel, BertForMaskedLM, ...).

    tokens [n_items]: the token of every item code, code + 1 where None. pad_token: the config's, else 0. mask_token:
    for a BERT style model, which predicts at that token; without it the last item predicts the next. max_len: the
    config's number of positions. hook_point: a dotted name within the model; its last hidden states where None.
    Raises TypeError for a model without such a head, ValueError for a layout that does not fit it.
    """
    config = getattr(model, "config", None)
    head = next((name for name in HEADS if hasattr(model, name)), None)
    prefix = getattr(model, "base_model_prefix", None)
    if config is None or head is None or not hasattr(model, prefix or ""):
        name = type(model).__name__
        raise TypeError(f"from_transformers: {name} has no language-modelling head ({', '.join(HEADS)})")
    if pad_token is None:
        pad_token = 0 if getattr(config, "pad_token_id", None) is None else config.pad_token_id
    places = getattr(config, "max_position_embeddings", None)
    max_len = places if max_len is None else max_len
    if max_len is None or (places is not None and max_len > places):
        raise ValueError(f"from_transformers: max_len must be given, and at most {places} positions; got {max_len}")
    highest = n_items if tokens is None else int(tokens.max())
    if max(highest, pad_token, mask_token or 0) >= config.vocab_size:
        raise ValueError(
            f"from_transformers: {n_items} items with tokens up to {highest}, pad_token {pad_token} and mask_token "
            f"{mask_token} do not fit the model's vocabulary of {config.vocab_size}"
        )
    layout = {"max_len": max_len, "pad_token": pad_token, "mask_token": mask_token, "tokens": tokens}
    return TransformersSequence(model, hook_point or prefix, n_items, prefix, head, item_ids=item_ids, **layout)


class TransformersSequence(SequenceAdapter):
    """Right-padded, with an attention mask; only the position that is scored goes through the head."""

    def __init__(self, model: nn.Module, hook_point: str, n_items: int, base: str, head: str, **layout) -> None:
        self._base, self._head = base, head
        super().__init__(model, hook_point, n_items, padding="right", **layout)

    def scores(self, tokens: Tensor) -> Tensor:
        out = getattr(self.model, self._base)(tokens, attention_mask=self.mask(tokens).long(), return_dict=True)
        return getattr(self.model, self._head)(self.last(out.last_hidden_state, tokens))

    def item_head(self) -> tuple[nn.Module | None, Tensor, Tensor | None]:
        """As those of our recommenders; ValueError for a hook point or head other than GPT-2's and BERT's."""
        head = getattr(self.model, self._head)
        query, linear = None, head
        if hasattr(head, "predictions"):
            query, linear = head.predictions.transform, head.predictions.decoder
        if self.hook_point != f"model.{self._base}" or not isinstance(linear, nn.Linear):
            raise ValueError(f"item_head: how items are scored from {self.hook_point!r} is not known")
        items = self.token_of[1:]
        return query, linear.weight[items], None if linear.bias is None else linear.bias[items]
