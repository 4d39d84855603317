"""A TopKSAE whose latents are spread over processes: each computes its own, and the choice is that of the whole."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops import sparse_decode, topk_encode
from ..ops.refit_values import conjugate_gradients
from ..ops.sparse_decode import code_products
from .code import SparseCode
from .group import summed
from .loss import SAELoss, squared_error
from .sae import TopKSAE

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ShardedTopKSAE(TopKSAE):
    """A TopKSAE of d_sae latents over the processes of `shard_group`: rank r holds the r-th equal block of them.

    W_enc, W_dec [d_sae / processes, d_in], b_enc and rows_since_fired alike; b_dec and the normaliser on each. It
    starts as the TopKSAE of the same arguments and random state, of which every process holds the whole for a moment.
    All processes call each method together, with the same x.

    The k latents of a row are exactly those of the unsharded SAE, ties included: its k strongest are among the k
    strongest of each process. Values go between the processes in the dtype they have: in bfloat16, equal ones are ties.
    A reconstruction is the sum of the processes' parts. `encode` and `decode` deal in whole codes and pass no gradient
    to the weights; `loss`, which trains, gives the whole loss, and of the code the slots whose latents are here, other
    values 0.

    Raises ValueError where the number of processes does not divide d_sae, or k is more than a process has latents.
    """

    sharded = ("W_enc", "b_enc", "W_dec", "rows_since_fired")
    _affine_code = False  # the reconstruction is summed over the processes in between

    def __init__(self, d_in: int, d_sae: int, k: int, *, shard_group: ProcessGroup, **options: Any) -> None:
        size, self_rank = torch.distributed.get_world_size(shard_group), torch.distributed.get_rank(shard_group)
        if d_sae % size:
            raise ValueError(f"ShardedTopKSAE: d_sae {d_sae} must be a multiple of the {size} processes that share it")
        if k > d_sae // size:
            raise ValueError(
                f"ShardedTopKSAE: k {k} must be at most the {d_sae // size} latents of each of {size} processes"
            )
        super().__init__(d_in, d_sae, k, **options)
        self.shard_group, self._size, self._rank = shard_group, size, self_rank
        for name in self.sharded:
            mine = getattr(self, name).detach().chunk(size)[self_rank].clone()
            setattr(self, name, nn.Parameter(mine) if name in self._parameters else mine)
        self._sum_gradient()

    def _sum_gradient(self) -> None:
        # the encoder's part of b_dec's gradient comes from each process's own latents
        self.b_dec.register_hook(lambda grad: summed(grad, self.shard_group))

    @property
    def first(self) -> int:
        """The number, in the whole, of the first latent that is here."""
        return self._rank * (self.d_sae // self._size)

    def encode(self, x: Tensor) -> SparseCode:
        self._check_input(x)
        normalized, offset, scale = self.normalizer(x)
        normalized = normalized.to(self.W_enc.dtype)
        values, indices = super()._choose(normalized)
        values, indices = (t.reshape(-1, self.k) for t in (values.detach(), indices + self.first))
        order = self._strongest(self._scores(values), self.k)
        whole = (self._gathered(t).gather(-1, order).reshape(*x.shape[:-1], self.k) for t in (values, indices))
        values, indices = self._fitted(normalized, *whole)
        return SparseCode(values.to(x.dtype), indices, self.d_sae, offset, scale)

    def loss(self, x: Tensor, weight: Tensor | None = None) -> SAELoss:
        out = super().loss(x, weight)
        return out._replace(code=out.code.replace(indices=out.code.indices + self.first))

    def _decoded(self, values: Tensor, indices: Tensor, b_dec: Tensor | None) -> Tensor:
        mine, here = self._here(indices)
        part = sparse_decode(torch.where(mine, values, 0), here, self.W_dec, None)
        y = summed(part, self.shard_group)
        return y if b_dec is None else y + b_dec

    def _fit_values(self, x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        decode = partial(self._decoded, b_dec=None)
        return conjugate_gradients(x, values, indices, decode, self._products, self.refit)

    def _products(self, y: Tensor, indices: Tensor) -> Tensor:
        """y . W_dec[index] of the whole's latents [N, k]."""
        mine, here = self._here(indices)
        return summed(torch.where(mine, code_products(y, here, self.W_dec), 0), self.shard_group)

    def _here(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Whether a latent of the whole is here, and its number here, 0 where it is not."""
        here = indices - self.first
        mine = (here >= 0) & (here < self.W_dec.shape[0])
        return mine, torch.where(mine, here, 0)

    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen slots whose latents are here, by their number here; the others hold value 0."""
        values, indices = super()._choose(x)
        return self._survivors(values, indices, self._scores(values.detach()), self.k)

    def _scores(self, values: Tensor) -> Tensor:
        return values.abs() if self.activation == "abs" else values

    def _survivors(self, values: Tensor, indices: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        width = values.shape[1]
        count = (self._strongest(scores, k) // width == self._rank).sum(-1, keepdim=True)
        # candidates are in order: those that survive come first
        keep = torch.arange(width, device=values.device) < count
        if values.device.type == "cpu" and len(count):  # a look at a CPU tensor is no sync
            width = max(1, int(count.max()))
        return torch.where(keep, values, 0)[:, :width], indices[:, :width]

    def _strongest(self, scores: Tensor, k: int) -> Tensor:
        """The places [N, k] of the best among all processes' candidates, those standing side by side."""
        # stable, and blocks of latents stand in the order of the processes: equal scores by the lower latent first
        return self._gathered(scores).argsort(dim=-1, descending=True, stable=True)[:, :k]

    def _gathered(self, t: Tensor) -> Tensor:
        """t [N, c] of each process side by side, [N, processes * c]."""
        parts = [torch.empty_like(t) for _ in range(self._size)]
        torch.distributed.all_gather(parts, t.contiguous(), group=self.shard_group)
        return torch.cat(parts, dim=1)

    def _firing_per_row(self, values: Tensor) -> Tensor:
        return summed(super()._firing_per_row(values), self.shard_group)

    def _reconstruction_error(
        self, values: Tensor, indices: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor
    ) -> Tensor:
        y = _Summed.apply(sparse_decode(values, indices, self.W_dec, None), self.shard_group)
        # every process has the whole error: the gradient of b_dec, which is summed, comes from one of them
        b_dec = self.b_dec if self._rank == 0 else self.b_dec.detach()
        return squared_error(y + b_dec, x, weight) / scale

    def _aux(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """As in TopKSAE: the same candidates, the same k_aux of them per row, the same denominator."""
        silent = self._gathered(self.rows_since_fired[None]).squeeze(0)
        dead = silent > self.dead_after
        if dead.device.type == "cpu" and not bool(dead.any()):
            return x.new_zeros(())
        candidates = torch.zeros_like(dead)
        candidates[silent.topk(min(self.d_sae, max(self.k_aux, self.d_sae // 4))).indices] = True
        mine = (candidates & dead).chunk(self._size)[self._rank]
        few = slice(0, self._aux_rows_here())
        centred, rows = x[few].detach() - self.b_dec.detach(), None if weight is None else weight[few]
        k = min(self.k_aux, self.W_enc.shape[0])
        found, at = topk_encode(centred, self.W_enc, self.b_enc, k, activation=self.activation, latent_mask=mine)
        scores = torch.where(mine[at.long()], self._scores(found.detach()), -torch.inf)
        found, at = self._survivors(found, at, scores, self.k_aux)
        left = squared_error(_Summed.apply(sparse_decode(found, at, self.W_dec), self.shard_group), centred, rows)
        energy = summed(squared_error(torch.zeros_like(centred), centred, rows), self.data_group)
        return torch.where(dead.any(), left / torch.where(energy > 0, energy, 1), 0)


class _Summed(torch.autograd.Function):
    """The sum over a group; each process goes on with the whole, so the gradient is the same on each already."""

    @staticmethod
    def forward(ctx, t, group):
        return summed(t, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None
