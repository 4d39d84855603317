"""RecBole: MultiVAE, SASRec, BERT4Rec, and other autoencoders and sequence models by the name of their bottleneck."""

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor, nn

from .._bags import multi_hot
from .base import Adapter, SequenceAdapter

# where what is scored comes from: the last block of SASRec, the head's norm of BERT4Rec
HOOK_POINTS = {"SASRec": "trm_encoder.layer.{last}", "BERT4Rec": "output_ln"}


def from_recbole(model: nn.Module, dataset: Any = None, *, hook_point: str | None = None) -> Adapter:
    """The adapter of a trained RecBole model; item code c is RecBole's internal id c + 1, 0 being its padding.

    dataset: RecBole's, for the outer item ids (codes without). hook_point: a dotted name within the model; known for
    MultiVAE (the decoder's input, mu), SASRec and BERT4Rec. Raises TypeError for a model that is neither sequential nor
    an autoencoder, ValueError where a name is needed or its output is not the bottleneck.
    """
    ids = None
    if dataset is not None:
        ids = [str(token) for token in dataset.id2token(dataset.iid_field, list(range(1, model.n_items)))]
    name = type(model).__name__
    if all(hasattr(model, attribute) for attribute in ("ITEM_SEQ", "ITEM_SEQ_LEN", "full_sort_predict")):
        if hook_point is None and name not in HOOK_POINTS:
            raise ValueError(f"from_recbole: hook_point must be given for {name}; known: {', '.join(HOOK_POINTS)}")
        return RecBoleSequence(model, hook_point, ids)
    if all(hasattr(model, attribute) for attribute in ("encoder", "decoder", "get_rating_matrix")):
        return RecBoleAutoencoder(model, hook_point, ids)
    raise TypeError(f"from_recbole: {name} is neither a sequential recommender nor an autoencoder of RecBole")


class RecBoleSequence(SequenceAdapter):
    """Any of RecBole's sequential recommenders that scores from the item sequence alone."""

    def __init__(self, model: nn.Module, hook_point: str | None, item_ids: Sequence[Hashable] | None) -> None:
        if hook_point is None:
            layers = getattr(getattr(model, "trm_encoder", None), "layer", ())
            hook_point = HOOK_POINTS[type(model).__name__].format(last=len(layers) - 1)
        super().__init__(
            model, hook_point, model.n_items - 1, max_len=model.max_seq_length, padding="right", item_ids=item_ids
        )

    def scores(self, tokens: Tensor) -> Tensor:
        batch = {self.model.ITEM_SEQ: tokens, self.model.ITEM_SEQ_LEN: self.lengths(tokens)}
        return self.model.full_sort_predict(batch).reshape(len(tokens), -1)

    def item_head(self) -> tuple[None, Tensor, Tensor | None]:
        """As those of our recommenders; ValueError for a hook point that items are not known to be read from."""
        name, layers = type(self.model).__name__, getattr(getattr(self.model, "trm_encoder", None), "layer", ())
        if self.hook_point != f"model.{HOOK_POINTS.get(name, '').format(last=len(layers) - 1)}":
            raise ValueError(f"item_head: how {name} scores items from {self.hook_point!r} is not known")
        items = self.model.item_embedding.weight[1 : self.n_items + 1]
        return None, items, self.model.output_bias[1:] if name == "BERT4Rec" else None


class _Through:
    """Sends the decoder's input through the bottleneck, in RecBole's own calls too; an object, so that it is copied."""

    def __init__(self, bottleneck: nn.Module) -> None:
        self.bottleneck = bottleneck

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        return (self.bottleneck(args[0]), *args[1:])


class RecBoleAutoencoder(Adapter):
    """MultiVAE and its like: no module puts out mu alone, so the module "bottleneck" stands before the decoder."""

    def __init__(self, model: nn.Module, hook_point: str | None, item_ids: Sequence[Hashable] | None) -> None:
        name = "bottleneck" if hook_point is None else f"model.{hook_point}"
        super().__init__(model, name, model.n_items - 1, item_ids)
        self.bottleneck = nn.Identity()
        if hook_point is None:
            model.decoder.register_forward_pre_hook(_Through(self.bottleneck))
        self.d = self._probe()

    def inputs(self, flat: Tensor, offsets: Tensor) -> Tensor:
        """Bags -> [B, n_items + 1], column 0 for the padding."""
        device = next(self.model.parameters()).device
        return multi_hot(flat.to(device) + 1, offsets.to(device), self.n_items + 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.model(x)
        return (scores if isinstance(scores, Tensor) else scores[0])[:, 1:]

    def item_head(self) -> tuple[nn.Module, Tensor, Tensor]:
        """As that of MultVAE; ValueError where the hook point is not the decoder's input."""
        if self.hook_point != "bottleneck":
            raise ValueError(f"item_head: items are scored from the decoder's input, not from {self.hook_point!r}")
        return self.model.decoder[:-1], self.model.decoder[-1].weight[1:], self.model.decoder[-1].bias[1:]
