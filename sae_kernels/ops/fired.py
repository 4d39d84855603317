"""Which latents fire somewhere in a batch."""

import torch
from torch import Tensor

from ._backend import cuda_or, pick, triton_or
from ._rows import row_blocks

_lib = torch.library.Library("sae_kernels", "FRAGMENT")
for _name in ("cuda", "triton"):
    _lib.define(f"fired_{_name}(Tensor values, Tensor indices, Tensor? weight, int d_sae) -> Tensor")
_KERNELS = {"cuda": torch.ops.sae_kernels.fired_cuda.default, "triton": torch.ops.sae_kernels.fired_triton.default}


@torch.library.register_fake("sae_kernels::fired_cuda", lib=_lib)
@torch.library.register_fake("sae_kernels::fired_triton", lib=_lib)
def _fake(values, indices, weight, d_sae):
    return values.new_empty(d_sae, dtype=torch.bool)


@torch.no_grad()
def fired(values: Tensor, indices: Tensor, d_sae: int, weight: Tensor | None = None) -> Tensor:
    """[d_sae] bool of a code's values, indices [N, k], indices in [0, d_sae): whether any value of a latent is not 0,
    in rows of weight [N] above 0 where there is one.
    """
    run = _KERNELS.get(pick(values.device, on_cuda="cuda"), _plain)
    return run(values, indices, weight, d_sae)


def _plain(values: Tensor, indices: Tensor, weight: Tensor | None, d_sae: int) -> Tensor:
    found = torch.zeros(d_sae + 1, dtype=torch.bool, device=values.device)
    for block in row_blocks(values):
        fires = values[block] != 0
        if weight is not None:
            fires = fires & (weight[block] > 0).unsqueeze(-1)
        # slots that do not fire go to one latent too many; every write is the same, so the order does not matter
        found.index_fill_(0, torch.where(fires, indices[block], d_sae).reshape(-1).long(), True)
    return found[:d_sae].clone()


def _cuda(values: Tensor, indices: Tensor, weight: Tensor | None, d_sae: int) -> Tensor:
    from ..cuda import activation_stats

    return activation_stats.fired(values, indices, weight, d_sae)


def _triton(values: Tensor, indices: Tensor, weight: Tensor | None, d_sae: int) -> Tensor:
    from ..kernels import activation_stats

    return activation_stats.fired(values, indices, weight, d_sae)


_without_triton = cuda_or(_cuda, _plain)
_lib.impl("fired_cuda", _without_triton, "CompositeExplicitAutograd")
_lib.impl("fired_triton", triton_or(_triton, _without_triton), "CompositeExplicitAutograd")
