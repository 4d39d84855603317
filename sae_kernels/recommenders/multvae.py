"""MultVAE: a variational autoencoder with a multinomial likelihood (Liang et al. 2018)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, embedding_bag, linear, log_softmax, normalize

from ._bags import distinct, multi_hot, row_ids


class MultVAEEncoder(nn.Module):
    """x [B, n_items], or bags (flat, offsets [B + 1]) -> mu [B, d]. In training the input has dropout; mu no noise."""

    def __init__(self, n_items: int, d: int, hidden: int, p: float) -> None:
        super().__init__()
        self.d, self.p = d, p
        # a row per item, so that a bag is a sum of rows
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(n_items, hidden)))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.out = nn.Linear(hidden, 2 * d)
        nn.init.xavier_normal_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def moments(self, x: Tensor, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """mu and log variance, both [B, d]; rows of the input are brought to unit length first."""
        if offsets is None:
            if x.dim() == 0 or x.shape[-1] != self.weight.shape[0]:
                raise ValueError(f"MultVAE: x {tuple(x.shape)} must end in n_items = {self.weight.shape[0]}")
            hidden = linear(dropout(normalize(x, dim=-1), self.p, self.training), self.weight.T, self.bias)
        else:
            scale = offsets.diff().to(self.weight.dtype).rsqrt()[row_ids(offsets)]
            scale = dropout(scale, self.p, self.training)
            hidden = embedding_bag(
                x, self.weight, offsets, mode="sum", per_sample_weights=scale, include_last_offset=True
            )
            hidden = hidden + self.bias
        mu, log_variance = self.out(hidden.tanh()).split(self.d, dim=-1)
        return mu, log_variance

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        return self.moments(x, offsets)[0]


class MultVAE(nn.Module):
    """forward(x [B, n_items]) -> logits [B, n_items] = decoder(mu), mu = encoder(x) the output of the module "encoder".

    hidden: width of the tanh layer on either side, 3 d unless given. dropout: on the input. beta: final weight of the
    KL term, reached linearly after anneal_steps training steps.
    """

    hook_point, positions, mask = "encoder", "all", None

    def __init__(
        self,
        n_items: int,
        d: int = 256,
        *,
        hidden: int | None = None,
        dropout: float = 0.5,
        beta: float = 0.2,
        anneal_steps: int = 2000,
    ) -> None:
        super().__init__()
        if n_items < 1 or d < 1:
            raise ValueError(f"MultVAE: n_items and d must be at least 1, got {n_items} and {d}")
        if not 0 <= dropout < 1:
            raise ValueError(f"MultVAE: dropout must be in [0, 1), got {dropout}")
        if beta < 0 or anneal_steps < 1:
            raise ValueError(f"MultVAE: beta and anneal_steps must be at least 0 and 1, got {beta} and {anneal_steps}")
        hidden = 3 * d if hidden is None else hidden
        self.n_items, self.d, self.beta, self.anneal_steps = n_items, d, beta, anneal_steps
        self.encoder = MultVAEEncoder(n_items, d, hidden, dropout)
        self.decoder = nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, n_items))
        for layer in (self.decoder[0], self.decoder[2]):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))

    def inputs(self, flat: Tensor, offsets: Tensor) -> Tensor:
        """Bags -> the rows [B, n_items] of zeros and ones that forward takes."""
        return multi_hot(flat, offsets, self.n_items, self.encoder.weight.dtype)

    def encode_histories(self, flat: Tensor, offsets: Tensor) -> Tensor:
        """Bags (flat [nnz], offsets [B + 1]) -> mu [B, d]; the multi-hot rows are never built, and an item that stands
        twice counts once, as in one."""
        return self.encoder(*distinct(flat, offsets, self.n_items))

    def score_histories(self, flat: Tensor, offsets: Tensor) -> Tensor:
        """Bags -> logits [B, n_items]."""
        return self.decoder(self.encode_histories(flat, offsets))

    def item_head(self) -> tuple[nn.Module, Tensor, Tensor]:
        """(query, items [n_items, hidden], bias [n_items]): mu scores query(mu) @ items.T + bias."""
        return self.decoder[:2], self.decoder[2].weight, self.decoder[2].bias

    def training_loss(self, flat: Tensor, offsets: Tensor) -> Tensor:
        """Mean over the rows of -log p(x | z) + beta_t KL(q(z | x) || N(0, 1)), z from q; counts one step of beta.

        The items of a row must be distinct.
        """
        mu, log_variance = self.encoder.moments(flat, offsets)
        z = mu + torch.randn_like(mu) * (log_variance / 2).exp()
        log_p = log_softmax(self.decoder(z), dim=-1)
        likelihood = log_p[row_ids(offsets), flat].sum() / mu.shape[0]
        kl = (mu.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        beta = self.beta * (self.steps / self.anneal_steps).clamp(max=1)
        self.steps += 1
        return beta * kl - likelihood
