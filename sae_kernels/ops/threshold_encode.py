"""threshold_encode: every latent above its threshold, exact and differentiable; rows x d_sae never exists in memory."""

import math

import torch
from torch import Tensor

from . import _autocast, _checks, reference
from ._backend import cuda_or, triton_or
from ._rows import as_rows
from .topk_encode import ACTIVATIONS, backends, by_parts, check_encoder, encoder_grads, in_32_bits

_lib = torch.library.Library("sae_kernels", "FRAGMENT")
_ARGUMENTS = (
    "Tensor x, Tensor W_enc, Tensor? b_enc, Tensor threshold, int max_active, int activation, Tensor? latent_mask"
)
for _suffix in ("", "_triton", "_cuda"):
    _lib.define(f"threshold_encode{_suffix}({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
_forward = {
    "cpu": torch.ops.sae_kernels.threshold_encode.default,
    "triton": torch.ops.sae_kernels.threshold_encode_triton.default,
    "cuda": torch.ops.sae_kernels.threshold_encode_cuda.default,
}


@torch.library.register_fake("sae_kernels::threshold_encode_cuda", lib=_lib)
@torch.library.register_fake("sae_kernels::threshold_encode_triton", lib=_lib)
@torch.library.register_fake("sae_kernels::threshold_encode", lib=_lib)
def _forward_fake(x, W_enc, b_enc, threshold, max_active, activation, latent_mask):
    indices = x.new_empty(x.shape[0], max_active, dtype=torch.int32)
    return x.new_empty(indices.shape, dtype=reference.accumulator(x.dtype)), indices, indices.new_empty(x.shape[0])


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor | float,
    *,
    max_active: int,
    activation: str = "relu",
    latent_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of activation(x W_enc^T + b_enc) above a threshold, per row in descending order.

    x [..., d_in]; W_enc [d_sae, d_in]; b_enc [d_sae] or None; all of one dtype: float32, float64, bfloat16 or float16.
    threshold: a number or a tensor [] for all latents (a trained BatchTopK), or [d_sae], one per latent (JumpReLU), of
    any floating dtype. A latent passes where its pre-activation (its magnitude under activation="abs") is greater than
    its threshold, and under "relu" and "abs" greater than 0; NaN passes always. latent_mask [d_sae] bool: only latents
    that are True can pass. max_active: 1 to d_sae, the slots of a row.

    Returns values [..., max_active] in x's dtype, indices [..., max_active] int32 and counts [...] int32. The order is
    topk_encode's: NaN first, equal values by the lower index. Slots past a row's count hold value 0 and the lowest
    latents that did not pass: the indices of a row are valid and distinct, and sparse_decode needs no counts. Where
    more than max_active pass, the max_active strongest are returned and counts still tells how many passed: counts >
    max_active marks every row that lost something.

    Thresholds are compared with pre-activations accumulated in float32 (float64 for float64), before any rounding.
    Differentiable once in x, W_enc and b_enc; the threshold gets no gradient. A straight-through estimator for it
    (Rajamanoharan et al. 2024) needs the pre-activations within half a bandwidth of it: ask with the threshold lowered
    by so much, and apply the step to the values, as JumpReLUSAE does. Workspace: as topk_encode with k = max_active.

    Under autocast, tensors of different floating dtypes are brought to W_enc's. Raises TypeError or ValueError that
    names the argument, before any work.
    """
    x_dtype = x.dtype if isinstance(x, Tensor) else None
    x, b_enc = _autocast.widened(W_enc, x, b_enc)
    check_encoder("threshold_encode", x, W_enc, b_enc, activation, latent_mask, max_active=max_active)
    limit = _limit(threshold, x, W_enc.shape[0], activation)
    run = _ThresholdEncode.apply if _checks.needs_grad(x, W_enc, b_enc) else _ThresholdEncode.forward
    flat = as_rows(x)
    values, indices, counts = run(flat, W_enc, b_enc, limit, max_active, activation, latent_mask, backends(x.device))
    shape = (*x.shape[:-1], max_active)
    return values.reshape(shape).to(x_dtype), indices.reshape(shape), counts.reshape(shape[:-1])


def _limit(threshold: object, x: Tensor, d_sae: int, activation: str) -> Tensor:
    """The threshold as the kernels want it: [1] or [d_sae] in the accumulator's dtype, not NaN, not below the floor."""
    op, acc = "threshold_encode", reference.accumulator(x.dtype)
    if not isinstance(threshold, Tensor):
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise TypeError(f"{op}: threshold must be a number or a tensor, got {type(threshold).__name__}")
        if math.isnan(threshold):
            raise ValueError(f"{op}: threshold must not be NaN")
        return torch.full((1,), threshold if activation == "none" else max(threshold, 0), dtype=acc, device=x.device)
    if threshold.dtype not in _checks.FLOATS:
        raise TypeError(f"{op}: threshold must be float32, float64, bfloat16 or float16, got {threshold.dtype}")
    if threshold.shape not in ((), (d_sae,)):
        raise ValueError(f"{op}: threshold must be [] or [d_sae] = [{d_sae}], got shape {tuple(threshold.shape)}")
    _checks.same_device(op, "x", x, "threshold", threshold)
    limit = threshold.detach().reshape(-1).to(acc).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return limit if activation == "none" else limit.clamp(min=0)


def threshold_with(backend: str, x, W_enc, b_enc, limit, max_active, activation, latent_mask):
    """The forward kernel of `backend` on 2-d, checked tensors; values in the accumulator's dtype."""
    if backend == "reference":
        with _autocast.switched_off(x.device):
            return reference.threshold_encode(x, W_enc, b_enc, limit, max_active, activation, latent_mask)
    return _forward[backend](x, W_enc, b_enc, limit, max_active, ACTIVATIONS.index(activation), latent_mask)


def _plain_forward(x, W_enc, b_enc, threshold, max_active, activation, latent_mask):
    options = (b_enc, threshold, max_active, ACTIVATIONS[activation], latent_mask)
    return by_parts(x, W_enc, reference.threshold_encode, *options)


def _triton_forward(x, W_enc, b_enc, threshold, max_active, activation, latent_mask):
    from ..kernels import threshold_encode as kernel

    arguments = (W_enc, b_enc, threshold, max_active, activation, latent_mask)
    return in_32_bits(kernel.threshold_encode, _plain_forward, x, *arguments)


def _cuda_forward(x, W_enc, b_enc, threshold, max_active, activation, latent_mask):
    from ..cuda import threshold_encode as kernel

    arguments = (W_enc, b_enc, threshold, max_active, activation, latent_mask)
    return in_32_bits(kernel.threshold_encode, _plain_forward, x, *arguments)


_without_triton = cuda_or(_cuda_forward, _plain_forward)
_lib.impl("threshold_encode_triton", triton_or(_triton_forward, _without_triton), "CompositeExplicitAutograd")
_lib.impl("threshold_encode_cuda", _without_triton, "CompositeExplicitAutograd")


class _ThresholdEncode(torch.autograd.Function):
    @staticmethod
    def forward(x, W_enc, b_enc, limit, max_active, activation, latent_mask, backends):
        return threshold_with(backends[0], x, W_enc, b_enc, limit, max_active, activation, latent_mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        save_for_counted_backward(ctx, inputs, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_values, *_):
        return *counted_backward(ctx, grad_values), *[None] * 5


def save_for_counted_backward(ctx, inputs: tuple, output: tuple) -> None:
    """inputs: x, W_enc, ..., backends; output: values, indices, counts, ..."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:2], *output[1:3])
    ctx.backend = inputs[-1][1]


def counted_backward(ctx, grad_values: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, W_enc and b_enc through the first counts[n] slots of every row."""
    x, W_enc, indices, counts = ctx.saved_tensors
    active = torch.arange(indices.shape[1], device=counts.device) < counts.unsqueeze(-1)
    grad_pre = torch.where(active, grad_values, 0).to(x.dtype)
    return encoder_grads(ctx.backend, ctx.needs_input_grad[:3], grad_pre, indices, x, W_enc)
