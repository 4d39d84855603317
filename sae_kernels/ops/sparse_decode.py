"""sparse_decode: the weighted sum of the chosen decoder rows; codes of size rows x d_sae never exist in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _autocast, _checks, reference
from ._backend import cuda_or, pick, triton_or
from ._rows import as_rows

_lib = torch.library.Library("sae_kernels", "FRAGMENT")
for _suffix in ("", "_triton", "_cuda"):
    _lib.define(f"sparse_decode{_suffix}(Tensor values, Tensor indices, Tensor W_dec, Tensor? b_dec) -> Tensor")
    _lib.define(
        f"sparse_decode{_suffix}_backward(Tensor grad, Tensor values, Tensor indices, Tensor W_dec) -> (Tensor, Tensor)"
    )
    _lib.define(f"sparse_decode{_suffix}_grad_values(Tensor grad, Tensor indices, Tensor W_dec) -> Tensor")
_ops = torch.ops.sae_kernels
_forward = {
    "cpu": _ops.sparse_decode.default,
    "triton": _ops.sparse_decode_triton.default,
    "cuda": _ops.sparse_decode_cuda.default,
}
_backward = {
    "cpu": _ops.sparse_decode_backward.default,
    "triton": _ops.sparse_decode_triton_backward.default,
    "cuda": _ops.sparse_decode_cuda_backward.default,
}
_grad_values = {
    "cpu": _ops.sparse_decode_grad_values.default,
    "triton": _ops.sparse_decode_triton_grad_values.default,
    "cuda": _ops.sparse_decode_cuda_grad_values.default,
}

_OUT_OF_RANGE = "sparse_decode: indices"  # how the kernels for the CPU begin to say so


@torch.library.register_fake("sae_kernels::sparse_decode_cuda", lib=_lib)
@torch.library.register_fake("sae_kernels::sparse_decode_triton", lib=_lib)
@torch.library.register_fake("sae_kernels::sparse_decode", lib=_lib)
def _forward_fake(values, indices, W_dec, b_dec):
    return W_dec.new_empty(values.shape[0], W_dec.shape[1])


@torch.library.register_fake("sae_kernels::sparse_decode_cuda_backward", lib=_lib)
@torch.library.register_fake("sae_kernels::sparse_decode_triton_backward", lib=_lib)
@torch.library.register_fake("sae_kernels::sparse_decode_backward", lib=_lib)
def _backward_fake(grad, values, indices, W_dec):
    return torch.empty_like(values, memory_format=torch.contiguous_format), W_dec.new_empty(W_dec.shape)


@torch.library.register_fake("sae_kernels::sparse_decode_cuda_grad_values", lib=_lib)
@torch.library.register_fake("sae_kernels::sparse_decode_triton_grad_values", lib=_lib)
@torch.library.register_fake("sae_kernels::sparse_decode_grad_values", lib=_lib)
def _grad_values_fake(grad, indices, W_dec):
    return grad.new_empty(indices.shape)


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """sum_j values[..., j] * W_dec[indices[..., j]] + b_dec.

    values [..., k]; indices [..., k] int32 or int64, in [0, d_sae), repeats allowed; W_dec [d_sae, d_out]; b_dec
    [d_out] or None; values, W_dec and b_dec of one dtype: float32, float64, bfloat16 or float16. Returns [..., d_out]
    in that dtype, accumulated in float32 (float64 for float64). Differentiable once in values, W_dec and b_dec; on CPU
    every gradient is summed in one fixed order, whatever the number of threads.

    Under autocast, tensors of different floating dtypes are brought to W_dec's. Raises TypeError or ValueError that
    names the argument; an index out of range raises ValueError (RuntimeError inside a compiled graph). The kernels on
    a GPU, which nobody waits for, make its row NaN instead and leave its entry out of W_dec's gradient.
    """
    values, b_dec = _autocast.widened(W_dec, values, b_dec)
    check_code("sparse_decode", values, indices, W_dec, b_dec)
    run = _SparseDecode.apply if _checks.needs_grad(values, W_dec, b_dec) else _SparseDecode.forward
    chosen = backends(values.device, W_dec.shape[1] * W_dec.element_size())
    y = run(as_rows(values), as_rows(indices), W_dec, b_dec, chosen)
    return y if values.dim() == 2 else y.reshape(*values.shape[:-1], W_dec.shape[1])


def code_products(y: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """y[n] . W_dec[indices[n, j]], [N, k], of y [N, d_out]: the gradient of sparse_decode in its values."""
    backend = backends(y.device, 0)[1]
    kernel = _reference_grad_values if backend == "reference" else _grad_values[backend]
    return naming_bad_indices("sparse_decode", kernel, indices, W_dec.shape[0], y, indices, W_dec)


def backends(device: torch.device, row_bytes: int) -> tuple[str, str]:
    """Of the forward kernel and of the gradients, each the faster on a GPU: an H200 gathered rows of 128 bytes 1.7
    times as fast by CUDA C++, longer ones 1.5 times as fast by Triton.
    """
    return pick(device, on_cuda="cuda" if row_bytes <= 128 else "triton"), pick(device)


def check_code(op: str, values: object, indices: object, W_dec: object, b_dec: object) -> None:
    """Raises TypeError or ValueError unless the first two are a code [..., k] of the decoder."""
    _checks.tensor(op, "values", values)
    _checks.tensor(op, "indices", indices)
    _checks.tensor(op, "W_dec", W_dec, 2)
    if values.dim() == 0 or values.shape != indices.shape:
        raise ValueError(f"{op}: values {tuple(values.shape)} and indices {tuple(indices.shape)} must both be [..., k]")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: indices must be int32 or int64, got {indices.dtype}")
    if b_dec is not None:
        _checks.tensor(op, "b_dec", b_dec, 1)
        if b_dec.shape[0] != W_dec.shape[1]:
            raise ValueError(f"{op}: b_dec {tuple(b_dec.shape)} must be [d_out] = [{W_dec.shape[1]}] of W_dec")
    _checks.floating(op, values=values, W_dec=W_dec, b_dec=b_dec)
    _checks.same_device(op, "values", values, "indices", indices)


def decode_with(backend: str, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """The forward kernel of `backend` on 2-d, checked tensors."""
    decode = _reference_forward if backend == "reference" else _forward[backend]
    return naming_bad_indices("sparse_decode", decode, indices, W_dec.shape[0], values, indices, W_dec, b_dec)


def naming_bad_indices(op: str, kernel: Callable, indices: Tensor, d_sae: int, *args) -> Any:
    """kernel(*args); where it finds an index out of range, a ValueError that says which (not in a compiled graph)."""
    if torch.compiler.is_compiling():
        return kernel(*args)
    try:
        return kernel(*args)
    except RuntimeError as error:
        if _OUT_OF_RANGE in str(error) or "out of bounds" in str(error):
            low, high = indices.aminmax()
            raise ValueError(
                f"{op}: indices must be in [0, d_sae = {d_sae}), got values from {low} to {high}"
            ) from None
        raise


_reference_forward = _autocast.unaffected(reference.sparse_decode)


def _triton_forward(values, indices, W_dec, b_dec):
    from ..kernels import sparse_decode as kernel

    return kernel.sparse_decode(values, indices, W_dec, b_dec)


def _triton_backward(grad, values, indices, W_dec):
    from ..kernels import tuning
    from ..kernels.latent_sums import latent_sums

    if W_dec.shape[1] <= tuning.widest_row(W_dec.element_size()):
        dW, _, dvalues = latent_sums(indices, values, grad, W_dec.shape[0], W=W_dec)
        return dvalues, dW
    return _triton_grad_values(grad, indices, W_dec), latent_sums(indices, values, grad, W_dec.shape[0])[0]


def _triton_grad_values(grad, indices, W_dec):
    from ..kernels import sparse_decode as kernel

    return kernel.grad_values(grad, indices, W_dec).to(grad.dtype)


def _cuda_forward(values, indices, W_dec, b_dec):
    from ..cuda import sparse_decode as kernel

    return kernel.sparse_decode(values, indices, W_dec, b_dec)


def _cuda_backward(grad, values, indices, W_dec):
    from ..cuda import sparse_decode as kernel

    return kernel.backward(grad, values, indices, W_dec)


def _cuda_grad_values(grad, indices, W_dec):
    from ..cuda import sparse_decode as kernel

    return kernel.grad_values(grad, indices, W_dec)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(values, indices, W_dec, b_dec, backends):
        return decode_with(backends[0], values, indices, W_dec, b_dec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, indices, W_dec, _, (_, backend) = inputs
        ctx.save_for_backward(values, indices, W_dec)
        ctx.backend = backend

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        values, indices, W_dec = ctx.saved_tensors
        need_values, _, need_W, need_b = ctx.needs_input_grad[:4]
        dvalues = dW = None
        if ctx.backend == "reference":
            dvalues, dW = _reference_backward(grad, values, indices, W_dec)
        elif need_W:
            dvalues, dW = _backward[ctx.backend](grad, values, indices, W_dec)
        elif need_values:
            dvalues = _grad_values[ctx.backend](grad, indices, W_dec)
        db = grad.sum(0, dtype=reference.accumulator(grad.dtype)).to(grad.dtype) if need_b else None
        return dvalues if need_values else None, None, dW if need_W else None, db, None


@_autocast.unaffected
def _reference_backward(grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor]:
    acc = reference.accumulator(W_dec.dtype)
    dW = reference.dense_codes(values.to(acc), indices, W_dec.shape[0]).mT @ grad.to(acc)
    return _reference_grad_values(grad, indices, W_dec).to(values.dtype), dW.to(W_dec.dtype)


@_autocast.unaffected
def _reference_grad_values(grad: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    acc = reference.accumulator(W_dec.dtype)
    return (grad.to(acc) @ W_dec.to(acc).mT).gather(-1, indices.long()).to(grad.dtype)


for _name, _triton, _cuda, _plain in (
    ("", _triton_forward, _cuda_forward, _reference_forward),
    ("_backward", _triton_backward, _cuda_backward, _reference_backward),
    ("_grad_values", _triton_grad_values, _cuda_grad_values, _reference_grad_values),
):
    _without_triton = cuda_or(_cuda, _plain)
    _lib.impl(f"sparse_decode_triton{_name}", triton_or(_triton, _without_triton), "CompositeExplicitAutograd")
    _lib.impl(f"sparse_decode_cuda{_name}", _without_triton, "CompositeExplicitAutograd")
