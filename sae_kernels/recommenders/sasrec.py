"""SASRec: self-attentive sequential recommendation (Kang & McAuley 2018)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from ._bags import pad_left

EPS = 1e-8


class Block(nn.Module):
    """x [B, T, d] -> [B, T, d]: q = LN(x); x = LN(q + attention(q, x, x)); x + feed-forward(x)."""

    def __init__(self, d: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(d, eps=EPS)
        self.attention_in = nn.Linear(d, 3 * d)
        self.attention_out = nn.Linear(d, d)
        self.feed_norm = nn.LayerNorm(d, eps=EPS)
        self.feed_in = nn.Linear(d, d)
        self.feed_out = nn.Linear(d, d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q = self.attention_norm(x)
        x = self.feed_norm(q + self._attend(q, x, mask))
        return x + self.dropout(self.feed_out(self.dropout(self.feed_in(x)).relu()))

    def _attend(self, q: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """mask [B, 1, T, T] bool, True where a position may look; None for causal."""
        B, T, d = x.shape
        (wq, wk, wv), (bq, bk, bv) = self.attention_in.weight.chunk(3), self.attention_in.bias.chunk(3)
        projected = ((q, wq, bq), (x, wk, bk), (x, wv, bv))
        q, k, v = ((t @ w.T + b).view(B, T, self.heads, d // self.heads).transpose(1, 2) for t, w, b in projected)
        p = self.dropout.p if self.training else 0.0
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=mask is None)
        return self.attention_out(out.transpose(1, 2).reshape(B, T, d))


class SASRec(nn.Module):
    """forward(seq [B, T] int64) -> scores [B, n_items + 1] of what comes after the last position.

    seq holds item code + 1 in time order, padded with 0 on the left, T at most max_len; column 0 of the scores belongs
    to the padding. Hidden states: the outputs of the modules "blocks.0", "blocks.1", ... and "norm" (the last one),
    all [B, T, d].

    mask_padding: True: no position looks at padding and positions count from the end of the sequence, so that the
    amount of padding changes nothing. False: the conventions of the published code: padding is looked at, positions
    count from the left end, so that T must be the max_len of its training.
    """

    hook_point, positions = "norm", "last"

    def __init__(
        self,
        n_items: int,
        d: int = 64,
        *,
        max_len: int = 50,
        n_blocks: int = 2,
        heads: int = 1,
        dropout: float = 0.2,
        mask_padding: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"n_items": n_items, "d": d, "max_len": max_len, "n_blocks": n_blocks, "heads": heads}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"SASRec: {name} must be an int of at least 1, got {value!r}")
        if d % heads:
            raise ValueError(f"SASRec: d = {d} must be a multiple of heads = {heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"SASRec: dropout must be in [0, 1), got {dropout}")
        self.n_items, self.d, self.max_len, self.mask_padding = n_items, d, max_len, mask_padding
        self.item_embedding = nn.Embedding(n_items + 1, d, padding_idx=0)
        self.position_embedding = nn.Embedding(max_len + 1, d, padding_idx=0)
        self.blocks = nn.ModuleList(Block(d, heads, dropout) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(d, eps=EPS)
        self.dropout = nn.Dropout(dropout)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)
        for embedding in (self.item_embedding, self.position_embedding):
            nn.init.zeros_(embedding.weight[0].detach())

    @property
    def hook_points(self) -> list[str]:
        """Names of the modules whose output is a hidden state, in order."""
        return [*(f"blocks.{i}" for i in range(len(self.blocks))), "norm"]

    @classmethod
    def from_state(cls, arrays: Mapping[str, object], heads: int = 1) -> "SASRec":
        """The model of a published PyTorch state dict (names item_emb.weight, attention_layers.0.in_proj_weight, ...).

        arrays: name -> tensor or numpy array, as np.load returns. Raises ValueError naming missing and unexpected keys.
        """
        state = {_renamed(name): torch.as_tensor(arrays[name]) for name in arrays}
        for name in ("item_embedding.weight", "position_embedding.weight"):
            if name not in state:
                raise ValueError(f"SASRec.from_state: the key for {name} is missing; got {', '.join(sorted(arrays))}")
        items, d = state["item_embedding.weight"].shape
        n_blocks = sum(name.endswith("attention_out.weight") for name in state)
        max_len = state["position_embedding.weight"].shape[0] - 1
        model = cls(items - 1, d, max_len=max_len, n_blocks=max(n_blocks, 1), heads=heads, mask_padding=False)
        # the published feed-forward layers are convolutions of width 1: [d, d, 1]
        state = {name: value.squeeze(-1) if value.dim() == 3 else value for name, value in state.items()}
        missing = sorted(model.state_dict().keys() - state.keys())
        unexpected = sorted(state.keys() - model.state_dict().keys())
        if missing or unexpected:
            raise ValueError(f"SASRec.from_state: missing keys {missing}, unexpected keys {unexpected}")
        model.load_state_dict(state)
        return model.eval()

    def forward(self, seq: Tensor) -> Tensor:
        return self.encode(seq)[:, -1] @ self.item_embedding.weight.T

    def encode(self, seq: Tensor) -> Tensor:
        """seq [B, T] int64 -> hidden states [B, T, d]; those of padded positions mean nothing."""
        T = self._checked(seq)
        place = torch.arange(1, T + 1, device=seq.device)
        place = self.max_len - T + place if self.mask_padding else place
        x = self.item_embedding(seq) * self.d**0.5 + self.position_embedding(place * (seq != 0))
        x = self.dropout(x)
        mask = self._mask(seq) if self.mask_padding else None
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def encode_histories(self, flat: Tensor, offsets: Tensor) -> Tensor:
        """Bags (flat [nnz] in time order, offsets [B + 1]) -> the last position's hidden state [B, d]."""
        return self.encode(self.inputs(flat, offsets))[:, -1]

    def score_histories(self, flat: Tensor, offsets: Tensor) -> Tensor:
        """Bags -> scores [B, n_items] of the next item, without the padding's column."""
        return self(self.inputs(flat, offsets))[:, 1:]

    def item_head(self) -> tuple[None, Tensor, None]:
        """(query, items [n_items, d], bias): a state h scores query(h) @ items.T + bias; None: as it is, none."""
        return None, self.item_embedding.weight[1:], None

    def training_loss(self, flat: Tensor, offsets: Tensor, negatives: int | None = None) -> Tensor:
        """Mean cross-entropy of the next item at all positions; against `negatives` random items alone if given."""
        seq = pad_left(flat, offsets, min(self.max_len + 1, int(offsets.diff().max())))
        inputs, targets = seq[:, :-1], seq[:, 1:]
        real = inputs != 0
        hidden, target = self.encode(inputs)[real], targets[real]
        items = self.item_embedding.weight
        if negatives is None:
            return cross_entropy(hidden @ items[1:].T, target - 1)
        drawn = torch.randint(1, self.n_items + 1, (negatives,), device=seq.device)
        others = (hidden @ items[drawn].T).masked_fill(drawn == target.unsqueeze(1), -torch.inf)
        goal = (hidden * items[target]).sum(1, keepdim=True)
        return cross_entropy(torch.cat([goal, others], 1), torch.zeros_like(target))

    def inputs(self, flat: Tensor, offsets: Tensor) -> Tensor:
        """Bags, in time order -> seq [B, T], what forward takes."""
        longest = int(offsets.diff().max()) if offsets.numel() > 1 else 0
        return pad_left(flat, offsets, max(min(self.max_len, longest), 1) if self.mask_padding else self.max_len)

    def mask(self, seq: Tensor) -> Tensor:
        """[B, T] bool: the positions that hold an item."""
        return seq != 0

    def _mask(self, seq: Tensor) -> Tensor:
        """[B, 1, T, T] bool: what is neither later nor padding; and the position itself, lest a row be all False."""
        T = seq.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=seq.device).tril()
        itself = torch.eye(T, dtype=torch.bool, device=seq.device)
        return ((causal & (seq != 0).unsqueeze(1)) | itself).unsqueeze(1)

    def _checked(self, seq: Tensor) -> int:
        if not isinstance(seq, Tensor) or seq.dtype not in (torch.int32, torch.int64):
            came = seq.dtype if isinstance(seq, Tensor) else type(seq).__name__
            raise TypeError(f"SASRec: seq must be an int64 tensor of item code + 1, got {came}")
        if seq.dim() != 2 or not 1 <= seq.shape[1] <= self.max_len:
            shape = tuple(seq.shape)
            raise ValueError(f"SASRec: seq must be [B, T] with 1 <= T <= max_len = {self.max_len}, got {shape}")
        return seq.shape[1]


def _renamed(name: str) -> str:
    """A published parameter name as ours; unknown names stay as they are and are reported by the strict loading."""
    parts = name.split(".")
    top = {"item_emb": "item_embedding", "pos_emb": "position_embedding", "last_layernorm": "norm"}
    layers = {
        "attention_layernorms": "attention_norm",
        "attention_layers": "attention",
        "forward_layernorms": "feed_norm",
        "forward_layers": "feed",
    }
    if parts[0] in top:
        return ".".join([top[parts[0]], *parts[1:]])
    if parts[0] not in layers or len(parts) < 3:
        return name
    rest = ".".join(parts[2:])
    for old, new in (("in_proj_", "in."), ("out_proj", "out"), ("conv1", "in"), ("conv2", "out")):
        rest = rest.replace(old, new)
    joint = "_" if layers[parts[0]] in ("attention", "feed") else "."
    return f"blocks.{parts[1]}.{layers[parts[0]]}{joint}{rest}"
