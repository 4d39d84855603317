"""topk_encode: the k largest latents of every row, exact and differentiable; rows x d_sae never exists in memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import _autocast, _checks, reference
from ._backend import cuda_or, pick, triton_or
from ._rows import as_rows
from .sparse_decode import decode_with

ACTIVATIONS = ("relu", "none", "abs")
_PLAIN_CELLS = 2**20  # of rows x d_sae that the reference holds at once

_lib = torch.library.Library("sae_kernels", "FRAGMENT")
for _suffix in ("", "_triton", "_cuda"):
    _lib.define(
        f"topk_encode{_suffix}(Tensor x, Tensor W_enc, Tensor? b_enc, int k, int activation, Tensor? latent_mask)"
        " -> (Tensor, Tensor)"
    )
    _lib.define(
        f"topk_encode{_suffix}_backward(Tensor grad_pre, Tensor indices, Tensor x, int d_sae) -> (Tensor, Tensor)"
    )
_ops = torch.ops.sae_kernels
_forward = {
    "cpu": _ops.topk_encode.default,
    "triton": _ops.topk_encode_triton.default,
    "cuda": _ops.topk_encode_cuda.default,
}
_backward = {
    "cpu": _ops.topk_encode_backward.default,
    "triton": _ops.topk_encode_triton_backward.default,
    "cuda": _ops.topk_encode_cuda_backward.default,
}


@torch.library.register_fake("sae_kernels::topk_encode_cuda", lib=_lib)
@torch.library.register_fake("sae_kernels::topk_encode_triton", lib=_lib)
@torch.library.register_fake("sae_kernels::topk_encode", lib=_lib)
def _forward_fake(x, W_enc, b_enc, k, activation, latent_mask):
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)


@torch.library.register_fake("sae_kernels::topk_encode_cuda_backward", lib=_lib)
@torch.library.register_fake("sae_kernels::topk_encode_triton_backward", lib=_lib)
@torch.library.register_fake("sae_kernels::topk_encode_backward", lib=_lib)
def _backward_fake(grad_pre, indices, x, d_sae):
    return x.new_empty(d_sae, x.shape[1]), x.new_empty(d_sae)


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    activation: str = "relu",
    latent_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest entries of activation(x W_enc^T + b_enc) per row, in descending order.

    x [..., d_in]; W_enc [d_sae, d_in]; b_enc [d_sae] or None; all of one dtype: float32, float64, bfloat16 or float16.
    k: 1 to d_sae. activation: "relu", "none", or "abs" (ranks by magnitude, keeps the sign). latent_mask [d_sae] bool:
    only latents that are True compete; where fewer than k of them exist, the others fill up with value 0.

    Returns values [..., k] in x's dtype and indices [..., k] int32. Equal values stand by the lower index first, so the
    indices of a row are valid and distinct also where fewer than k latents fire. NaN ranks highest. Selection is on
    pre-activations accumulated in float32 (float64 for float64). Differentiable once in x, W_enc and b_enc; a slot
    whose value is 0 under relu passes no gradient. Workspace, whatever rows x d_sae is: on CPU about 24 MiB and 1.5 MiB
    per thread, in Triton at most 160 MiB, in CUDA C++ 32 MiB and 8 k bytes per row of a chunk, or a copy of W_enc where
    it has 16 bits and d_in is up to 256.

    Under autocast, tensors of different floating dtypes are brought to W_enc's. Raises TypeError or ValueError that
    names the argument, before any work.
    """
    x_dtype = x.dtype if isinstance(x, Tensor) else None
    x, b_enc = _autocast.widened(W_enc, x, b_enc)
    check_encoder("topk_encode", x, W_enc, b_enc, activation, latent_mask, k=k)
    flat = as_rows(x)
    run = _TopKEncode.apply if _checks.needs_grad(x, W_enc, b_enc) else _TopKEncode.forward
    values, indices = run(flat, W_enc, b_enc, k, activation, latent_mask, backends(x.device))
    if x.dim() != 2:
        shape = (*x.shape[:-1], k)
        values, indices = values.reshape(shape), indices.reshape(shape)
    return values if values.dtype == x_dtype else values.to(x_dtype), indices


def check_encoder(op: str, x, W_enc, b_enc, activation, latent_mask, **sizes) -> None:
    """sizes: numbers of latents by the name of their argument, each from 1 to d_sae."""
    _checks.tensor(op, "x", x)
    _checks.tensor(op, "W_enc", W_enc, 2)
    if x.dim() == 0 or x.shape[-1] != W_enc.shape[1]:
        raise ValueError(f"{op}: x {tuple(x.shape)} must end in d_in = {W_enc.shape[1]} of W_enc {tuple(W_enc.shape)}")
    if b_enc is not None:
        _checks.tensor(op, "b_enc", b_enc, 1)
        if b_enc.shape[0] != W_enc.shape[0]:
            raise ValueError(f"{op}: b_enc {tuple(b_enc.shape)} must be [d_sae] = [{W_enc.shape[0]}] of W_enc")
    _checks.floating(op, x=x, W_enc=W_enc, b_enc=b_enc)
    for name, size in sizes.items():
        _checks.integer(op, name, size, 1, W_enc.shape[0])
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if latent_mask is not None:
        _checks.tensor(op, "latent_mask", latent_mask, 1)
        if latent_mask.dtype != torch.bool or latent_mask.shape[0] != W_enc.shape[0]:
            raise ValueError(
                f"{op}: latent_mask must be bool [{W_enc.shape[0]}], got {latent_mask.dtype} {tuple(latent_mask.shape)}"
            )
        _checks.same_device(op, "x", x, "latent_mask", latent_mask)


def backends(device: torch.device) -> tuple[str, str]:
    """Of an encoder's forward kernel and of its gradients, each the faster on a GPU."""
    return pick(device, on_cuda="cuda"), pick(device)


def topk_with(backend: str, x, W_enc, b_enc, k, activation, latent_mask) -> tuple[Tensor, Tensor]:
    """The forward kernel of `backend` on 2-d, checked tensors."""
    if backend == "reference":
        with _autocast.switched_off(x.device):
            return reference.topk_encode(x, W_enc, b_enc, k, activation, latent_mask)
    return _forward[backend](x, W_enc, b_enc, k, ACTIVATIONS.index(activation), latent_mask)


def _triton_forward(x, W_enc, b_enc, k, activation, latent_mask):
    from ..kernels import topk_encode as kernel

    return in_32_bits(kernel.topk_encode, _plain_forward, x, W_enc, b_enc, k, activation, latent_mask)


def _cuda_forward(x, W_enc, b_enc, k, activation, latent_mask):
    from ..cuda import topk_encode as kernel

    return in_32_bits(kernel.topk_encode, _plain_forward, x, W_enc, b_enc, k, activation, latent_mask)


def in_32_bits(kernel: Callable, plain: Callable, x: Tensor, *args) -> tuple:
    """kernel(x, *args), which holds 32 bits of score in its keys; plain(x, *args) for float64."""
    if x.dtype == torch.float64:
        return plain(x, *args)
    with _autocast.switched_off(x.device):
        return kernel(x, *args)


@_autocast.unaffected
def by_parts(x: Tensor, W_enc: Tensor, oracle: Callable, *args) -> tuple:
    """oracle(x, W_enc, *args), a bounded number of rows at a time."""
    parts = [oracle(part, W_enc, *args) for part in x.split(max(1, _PLAIN_CELLS // W_enc.shape[0]))]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _plain_forward(x, W_enc, b_enc, k, activation, latent_mask):
    return by_parts(x, W_enc, reference.topk_encode, b_enc, k, ACTIVATIONS[activation], latent_mask)


def _triton_backward(grad_pre, indices, x, d_sae):
    from ..kernels.latent_sums import latent_sums

    return latent_sums(indices, grad_pre, x, d_sae, with_totals=True)[:2]


def _cuda_backward(grad_pre, indices, x, d_sae):
    from ..cuda.sparse_decode import latent_sums

    return latent_sums(indices, grad_pre, x, d_sae, with_totals=True)[:2]


@_autocast.unaffected
def _plain_backward(grad_pre, indices, x, d_sae):
    acc = reference.accumulator(x.dtype)
    grad_codes = reference.dense_codes(grad_pre.to(acc), indices, d_sae)
    return (grad_codes.mT @ x.to(acc)).to(x.dtype), grad_codes.sum(0).to(x.dtype)


for _name, _triton, _cuda, _plain in (
    ("", _triton_forward, _cuda_forward, _plain_forward),
    ("_backward", _triton_backward, _cuda_backward, _plain_backward),
):
    _without_triton = cuda_or(_cuda, _plain)
    _lib.impl(f"topk_encode_triton{_name}", triton_or(_triton, _without_triton), "CompositeExplicitAutograd")
    _lib.impl(f"topk_encode_cuda{_name}", _without_triton, "CompositeExplicitAutograd")


class _TopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(x, W_enc, b_enc, k, activation, latent_mask, backends):
        return topk_with(backends[0], x, W_enc, b_enc, k, activation, latent_mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, W_enc, b_enc, _, activation, latent_mask, (_, backend) = inputs
        values, indices = output
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(x, W_enc, values, indices, latent_mask)
        ctx.activation, ctx.backend = activation, backend

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_values, _):
        x, W_enc, values, indices, latent_mask = ctx.saved_tensors
        grad_pre = grad_values
        if ctx.activation == "relu":
            grad_pre = torch.where(values == 0, 0, grad_pre)
        elif latent_mask is not None:
            grad_pre = torch.where(latent_mask[indices.long()], grad_pre, 0)
        return *encoder_grads(ctx.backend, ctx.needs_input_grad[:3], grad_pre, indices, x, W_enc), *[None] * 4


def encoder_grads(backend, needs, grad_pre, indices, x, W_enc) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, W_enc and b_enc, each where it is needed, from those of the chosen pre-activations [N, k]."""
    need_x, need_W, need_b = needs
    dx = dW = db = None
    if need_x:
        dx = decode_with(backend, grad_pre, indices, W_enc, None)
    if need_W or need_b:
        dW, db = _backward.get(backend, _plain_backward)(grad_pre, indices, x, W_enc.shape[0])
    return dx, dW if need_W else None, db if need_b else None
