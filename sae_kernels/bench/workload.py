"""The tensors of one case, made from a seed, so that every provider and every process sees the same numbers."""

from functools import cached_property

import torch
from torch import Tensor

from .cases import Case


class Workload:
    """x [rows, d_in]; W_enc, W_dec [d_sae, d_in]; b_enc [d_sae]; b_dec [d_in] of zeros; values, indices [rows, k],
    distinct in a row; grad_values [rows, k]; grad_out [rows, d_in]. Each is made when first asked for."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case, self.device, self.dtype = case, device, getattr(torch, case.dtype)

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def _random(self, seed: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator(seed), device=self.device).to(self.dtype)

    @cached_property
    def x(self) -> Tensor:
        x = self._random(1, self.case.rows, self.case.d_in)
        return x.abs() if self.case.inputs in ("sorted", "equal", "negative") else x

    @cached_property
    def W_enc(self) -> Tensor:
        c = self.case
        if c.inputs in (
            "sorted",
            "equal",
            "negative",
        ):  # with x >= 0: ascending along the latents, all equal, none fires
            level = {
                "sorted": torch.linspace(0.1, 1, c.d_sae),
                "equal": torch.ones(c.d_sae),
                "negative": -torch.ones(c.d_sae),
            }
            return level[c.inputs].unsqueeze(1).expand(-1, c.d_in).to(self.device, self.dtype).contiguous()
        W = self._random(2, c.d_sae, c.d_in)
        if c.inputs == "clustered":  # runs of 64 neighbouring latents that fire together
            W = 0.3 * W + self._random(3, -(-c.d_sae // 64), c.d_in).repeat_interleave(64, dim=0)[: c.d_sae]
        return (W / W.norm(dim=1, keepdim=True)).contiguous()

    @cached_property
    def W_dec(self) -> Tensor:
        W = self._random(4, self.case.d_sae, self.case.d_in)
        return W / W.norm(dim=1, keepdim=True)

    @cached_property
    def b_enc(self) -> Tensor:
        return 0.01 * self._random(5, self.case.d_sae)

    @cached_property
    def threshold(self) -> float:
        """What k latents of a row are above, on average over the first 64 rows."""
        score = torch.relu(self.x[:64].float() @ self.W_enc.float().mT + self.b_enc.float()).flatten()
        return score.topk(min(self.case.k * 64, len(score))).values[-1].item()

    @cached_property
    def b_dec(self) -> Tensor:
        return torch.zeros(self.case.d_in, dtype=self.dtype, device=self.device)

    @cached_property
    def values(self) -> Tensor:
        return self._random(6, self.case.rows, self.case.k).abs() + 0.1

    @cached_property
    def indices(self) -> Tensor:
        drawn = {"generator": self._generator(7), "device": self.device}
        start = torch.randint(self.case.d_sae, (self.case.rows, 1), dtype=torch.int32, **drawn)
        offsets = torch.randperm(self.case.d_sae, **drawn)[: self.case.k].int()
        return (start + offsets) % self.case.d_sae

    @cached_property
    def grad_values(self) -> Tensor:
        return self._random(8, self.case.rows, self.case.k)

    @cached_property
    def grad_out(self) -> Tensor:
        return self._random(9, self.case.rows, self.case.d_in)

    def sample(self, rows: int) -> "Workload":
        """The same weights with rows of x whose k-th and next pre-activation are well apart.

        There every exact selection agrees, whatever its rounding: reconstructions and gradients can be compared.
        """
        c = self.case
        some = self.x[: min(c.rows, 4 * rows)].double()
        pre = torch.relu(some @ self.W_enc.double().mT + self.b_enc.double())
        if c.k < c.d_sae:
            best = pre.topk(c.k + 1, dim=-1).values
            clear = (best[:, -2] - best[:, -1]).argsort(descending=True)[:rows]
        else:
            clear = torch.arange(min(rows, len(some)), device=some.device)
        small = Workload(c.with_rows(len(clear)), self.device)
        small.x = self.x[clear.sort().values].contiguous()
        small.W_enc, small.W_dec, small.b_enc, small.b_dec = self.W_enc, self.W_dec, self.b_enc, self.b_dec
        return small
