"""What all adapters share: where the bottleneck is, how histories become inputs, how item ids map; plain torch."""

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..._modules import find_module, get_tensor, put_tensor, tensor_key
from .._bags import multi_hot, pad_left


class Adapter(nn.Module):
    """A recommender that was made elsewhere, with the attributes and methods that ELSA, MultVAE and SASRec have.

    hook_point: the dotted name, within the adapter, of the module whose output is the embedding [B, d] or the hidden
    states [B, T, d]: what `record` and `attach` take. positions: which of them the scores come from, "all" for [B, d],
    "last" for [B, T, d]. n_items; item_ids: the outer id of every code; d: found by a probe.

    The wrapped model is the submodule "model", in eval mode from now on; nothing in it is changed. ValueError where the
    output at hook_point has another shape, naming it.
    """

    positions = "all"

    def __init__(self, model: nn.Module, hook_point: str, n_items: int, item_ids: Sequence[Hashable] | None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"{type(self).__name__}: model must be an nn.Module, got {type(model).__name__}")
        if n_items < 2:
            raise ValueError(f"{type(self).__name__}: n_items must be at least 2, got {n_items}")
        item_ids = list(range(n_items)) if item_ids is None else list(item_ids)
        if len(item_ids) != n_items:
            raise ValueError(f"{type(self).__name__}: item_ids names {len(item_ids)} items, the model has {n_items}")
        self.model, self.hook_point = model, hook_point
        self.eval()
        self.n_items, self.item_ids = n_items, item_ids
        self._code_of = {item: code for code, item in enumerate(item_ids)}

    def inputs(self, flat: Tensor, offsets: Tensor) -> Tensor:
        """Bags (flat [nnz] codes, offsets [B + 1]) -> what forward takes: rows of zeros and ones [B, n_items]."""
        weight = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))
        return multi_hot(flat, offsets, self.n_items, weight.dtype)

    def mask(self, inputs: Tensor) -> Tensor | None:
        """Which positions of the inputs are real [B, T] bool, as `record` and `attach` take it; None for [B, d]."""
        return None

    def encode_histories(self, flat: Tensor, offsets: Tensor) -> Tensor:
        """Bags -> what the scores come from, at the hook point: [B, d]. That of an empty sequence means nothing."""
        return self._at_hook_point(self.inputs(flat, offsets))

    def _at_hook_point(self, inputs: Tensor) -> Tensor:
        found = []
        where = f"{type(self).__name__} {self.hook_point!r}"

        def keep(module: nn.Module, args: tuple, output: object) -> None:
            found.append(get_tensor(output, tensor_key(output, where, None, None)))

        handle = find_module(self, self.hook_point).register_forward_hook(keep)
        try:
            self(inputs)
        finally:
            handle.remove()
        return found[0]

    def score_histories(self, flat: Tensor, offsets: Tensor) -> Tensor:
        """Bags -> scores [B, n_items]."""
        return self(self.inputs(flat, offsets))

    def codes(self, ids: Iterable[Hashable]) -> Tensor:
        """The codes [n] int64 of outer item ids; ValueError naming the first ids that the model does not know."""
        ids = list(ids)
        unknown = [item for item in ids if item not in self._code_of]
        if unknown:
            raise ValueError(f"codes: the model does not know {len(unknown)} of {len(ids)} item ids: {unknown[:5]}")
        return torch.tensor([self._code_of[item] for item in ids], dtype=torch.int64)

    @torch.no_grad()
    def _probe(self) -> int:
        """d, from two histories of one item each; ValueError where hook point or scores are not what they should be."""
        # the item twice: RecBole's BERT4Rec makes room for its mask by dropping the oldest item, however short the row
        inputs, shapes = self.inputs(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 4])), []
        name, module = type(self).__name__, find_module(self, self.hook_point)
        where = f"{name}: the module {self.hook_point!r}"
        all_rows = self.positions == "all"
        wanted = (2,) if all_rows else (2, inputs.shape[1])
        expected = "[B, d], an embedding per history" if all_rows else "[B, T, d], hidden states"

        def exchange(module: nn.Module, args: tuple, output: object) -> object:
            key = tensor_key(output, where, None, None)
            shapes.append(tuple(get_tensor(output, key).shape))
            fits = shapes[-1][:-1] == wanted
            return put_tensor(output, key, get_tensor(output, key).flip(0)) if fits else output

        scores = self(inputs)
        if scores.shape != (2, self.n_items):
            raise ValueError(f"{name}: the model's scores must be {(2, self.n_items)}, got {tuple(scores.shape)}")
        handle = module.register_forward_hook(exchange)
        try:
            exchanged = self(inputs)
        finally:
            handle.remove()
        if not shapes:
            raise ValueError(f"{where} did not run: expected one that puts out {expected}")
        if shapes[0][:-1] != wanted:
            came = f"for inputs {tuple(inputs.shape)} it puts out {shapes[0]}"
            raise ValueError(f"{where} is not the bottleneck: {came}, expected {expected}")
        if shapes[0][-1] == self.n_items:
            raise ValueError(f"{where} is not the bottleneck: its output {shapes[0]} is as wide as the items")
        if torch.equal(scores, exchanged):
            raise ValueError(f"{where} is not the bottleneck: the scores do not change with its output {shapes[0]}")
        return shapes[0][-1]


class CollaborativeAdapter(Adapter):
    """A plain torch model(x [B, n_items] of zeros and ones) -> scores [B, n_items]; the output at hook_point is [B, d].

    hook_point: a dotted name within `model`.
    """

    def __init__(
        self, model: nn.Module, hook_point: str, n_items: int, *, item_ids: Sequence[Hashable] | None = None
    ) -> None:
        super().__init__(model, f"model.{hook_point}", n_items, item_ids)
        self.d = self._probe()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class SequenceAdapter(Adapter):
    """A plain torch model(tokens [B, T] int64) -> scores [B, T, vocabulary] or [B, vocabulary]; hook point [B, T, d].

    max_len: T, of every batch. padding: the side on which short histories are filled up with pad_token; the latest
    items are kept. tokens [n_items]: the token of every code, code + 1 where None. mask_token: stands after the last
    item where it is given (BERT4Rec); the scores are read there, otherwise at the last item. A bidirectional model has
    been trained to predict at that token alone: record it with positions="last".
    """

    positions = "last"

    def __init__(
        self,
        model: nn.Module,
        hook_point: str,
        n_items: int,
        *,
        max_len: int,
        padding: str = "left",
        pad_token: int = 0,
        mask_token: int | None = None,
        tokens: Tensor | None = None,
        item_ids: Sequence[Hashable] | None = None,
    ) -> None:
        super().__init__(model, f"model.{hook_point}", n_items, item_ids)
        tokens = torch.arange(1, n_items + 1) if tokens is None else torch.as_tensor(tokens)
        _check_layout(max_len, padding, pad_token, mask_token, tokens, n_items)
        self.max_len, self.padding, self.pad_token, self.mask_token = max_len, padding, pad_token, mask_token
        table = torch.cat([torch.tensor([pad_token]), tokens.cpu()])
        device = next((p.device for p in model.parameters()), None)
        self.register_buffer("token_of", table.to(device), persistent=False)
        self.d = self._probe()

    def inputs(self, flat: Tensor, offsets: Tensor) -> Tensor:
        """Bags, in time order -> tokens [B, max_len]."""
        room = self.max_len - (self.mask_token is not None)
        rows = pad_left(flat.to(self.token_of.device), offsets.to(self.token_of.device), room)
        if self.mask_token is not None:
            rows = torch.cat([rows, rows.new_full((len(rows), 1), -1)], 1)
        if self.padding == "right":
            start = (rows == 0).sum(1, keepdim=True)
            place = torch.arange(self.max_len, device=rows.device) + start
            rows = rows.gather(1, place % self.max_len)
        tokens = self.token_of[rows.clamp(min=0)]
        return tokens if self.mask_token is None else tokens.masked_fill(rows == -1, self.mask_token)

    def mask(self, inputs: Tensor) -> Tensor:
        return inputs != self.pad_token

    def encode_histories(self, flat: Tensor, offsets: Tensor) -> Tensor:
        tokens = self.inputs(flat, offsets)
        return self.last(self._at_hook_point(tokens), tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, max_len] -> scores [B, n_items]."""
        scores = self.scores(tokens)
        scores = self.last(scores, tokens) if scores.dim() == 3 else scores
        if scores.dim() != 2 or scores.shape[1] <= int(self.token_of.max()):
            raise ValueError(
                f"{type(self).__name__}: the model must give scores [B, T, vocabulary] or [B, vocabulary] with a "
                f"column for token {int(self.token_of.max())}, got {tuple(scores.shape)}"
            )
        return scores[:, self.token_of[1:]]

    def scores(self, tokens: Tensor) -> Tensor:
        """tokens [B, max_len] -> scores by token, [B, vocabulary] or [B, T, vocabulary], each library its way."""
        return self.model(tokens)

    def last(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x [B, T, ...] -> [B, ...], its last real position (the first where none is)."""
        place = torch.arange(tokens.shape[1], device=tokens.device) * self.mask(tokens)
        return x[torch.arange(len(x), device=x.device), place.amax(1)]

    def lengths(self, tokens: Tensor) -> Tensor:
        """The number of real positions [B] int64, at least 1."""
        return self.mask(tokens).sum(1).clamp(min=1)


def _check_layout(max_len: int, padding: str, pad_token: int, mask_token: int | None, tokens: Tensor, n: int) -> None:
    op, least = "SequenceAdapter", 1 + (mask_token is not None)
    if isinstance(max_len, bool) or not isinstance(max_len, int) or max_len < least:
        raise ValueError(f"{op}: max_len must be an int of at least {least}, got {max_len!r}")
    if padding not in ("left", "right"):
        raise ValueError(f"{op}: padding must be 'left' or 'right', got {padding!r}")
    if tokens.dtype != torch.int64 or tokens.shape != (n,):
        raise ValueError(f"{op}: tokens must be int64 [n_items = {n}], got {tokens.dtype} {tuple(tokens.shape)}")
    if tokens.unique().numel() != n or int(tokens.min()) < 0:
        raise ValueError(f"{op}: tokens must be distinct and not negative")
    special = [pad_token] + ([] if mask_token is None else [mask_token])
    taken = [token for token in special if bool((tokens == token).any())]
    if taken or len(set(special)) != len(special):
        raise ValueError(f"{op}: pad_token {pad_token} and mask_token {mask_token} must differ and be no item's token")
