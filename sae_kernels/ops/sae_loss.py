"""sae_loss: what a code reconstructs and how far that is from x, in one pass; and the same through the encoder."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import _autocast, _checks, reference
from ._backend import pick, triton_or
from ._rows import as_rows
from .sparse_decode import check_code, naming_bad_indices, sparse_decode

_lib = torch.library.Library("sae_kernels", "FRAGMENT")
for _name in ("sae_loss", "sae_loss_triton"):
    _lib.define(
        f"{_name}(Tensor x, Tensor values, Tensor indices, Tensor W_dec, Tensor? b_dec, int[] prefixes)"
        " -> (Tensor, Tensor)"
    )
    _lib.define(
        f"{_name}_prefix_grads(Tensor grad_errors, Tensor residual, Tensor values, Tensor indices, Tensor W_dec,"
        " int[] prefixes) -> Tensor"
    )
    _lib.define(
        f"{_name}_backward(Tensor grad, Tensor? scale, Tensor values, Tensor indices, Tensor W_dec, int[] prefixes,"
        " Tensor? x, Tensor? centre, Tensor? more, bool relu) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
_ops = torch.ops.sae_kernels
_forward = {"cpu": _ops.sae_loss.default, "triton": _ops.sae_loss_triton.default}
_prefix_grads = {"cpu": _ops.sae_loss_prefix_grads.default, "triton": _ops.sae_loss_triton_prefix_grads.default}
_backward = {"cpu": _ops.sae_loss_backward.default, "triton": _ops.sae_loss_triton_backward.default}


@torch.library.register_fake("sae_kernels::sae_loss_triton", lib=_lib)
@torch.library.register_fake("sae_kernels::sae_loss", lib=_lib)
def _forward_fake(x, values, indices, W_dec, b_dec, prefixes):
    errors = x.new_empty(x.shape[0], len(prefixes), dtype=reference.accumulator(x.dtype))
    return errors, torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("sae_kernels::sae_loss_triton_prefix_grads", lib=_lib)
@torch.library.register_fake("sae_kernels::sae_loss_prefix_grads", lib=_lib)
def _prefix_grads_fake(grad_errors, residual, values, indices, W_dec, prefixes):
    return residual.new_empty(residual.shape[0], len(prefixes), residual.shape[1])


@torch.library.register_fake("sae_kernels::sae_loss_triton_backward", lib=_lib)
@torch.library.register_fake("sae_kernels::sae_loss_backward", lib=_lib)
def _backward_fake(grad, scale, values, indices, W_dec, prefixes, x, centre, more, relu):
    latents, d_in = (0, 0) if x is None else (W_dec.shape[0], x.shape[1])
    dvalues = W_dec.new_empty(values.shape[0] if x is None else 0, values.shape[1])
    encoder = W_dec.new_empty(latents, d_in), W_dec.new_empty(latents)
    return dvalues, W_dec.new_empty(W_dec.shape), W_dec.new_empty(W_dec.shape[1]), *encoder


class SAEError(NamedTuple):
    """errors [...] or [..., P]: |x_hat - x|^2 of every row, of each prefix; residual [..., d]: x_hat - x of the whole
    code, without gradient."""

    errors: Tensor
    residual: Tensor

    @property
    def total(self) -> Tensor:
        """The squared error of all rows: a scalar, or [P]."""
        return self.errors.reshape(-1, *self.errors.shape[self.residual.dim() - 1 :]).sum(0)


def sae_loss(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    prefixes: Sequence[int] | None = None,
) -> SAEError:
    """The squared error of sparse_decode(values, indices, W_dec, b_dec) against x [..., d_out], row by row.

    prefixes, ascending and ending with k: nested budgets (as in Matryoshka representations, over the slots of a row,
    strongest first). errors [..., P] then holds, for each p, the error of what the first prefixes[p] slots decode to
    with b_dec. All of them cost one pass over the code, and backward one more.

    Dtypes as in sparse_decode, x as W_dec; errors in float32 (float64 for float64), accumulated so. Differentiable once
    in x, values, W_dec and b_dec; on CPU every gradient is summed in one fixed order, whatever the number of threads.
    Memory: the residual, kept for backward, and with prefixes P times as much during backward; x_hat itself is never
    written (it is x + residual). Errors are raised as in sparse_decode.
    """
    values, b_dec, x = _autocast.widened(W_dec, values, b_dec, x)
    check_code("sae_loss", values, indices, W_dec, b_dec)
    _check_x("sae_loss", x, values, W_dec)
    ends = _checked_prefixes("sae_loss", prefixes, values.shape[-1])
    backend = pick(x.device)
    if backend not in _forward and backend != "reference":
        return _shaped(*_from_decode(x, values, indices, W_dec, b_dec, ends), x, prefixes)
    run = _Loss.apply if _checks.needs_grad(x, values, W_dec, b_dec) else _Loss.forward
    flat = as_rows(x), as_rows(values), as_rows(indices)
    errors, residual = run(*flat, W_dec, b_dec, ends, backend)
    return _shaped(errors, residual, x, prefixes)


def has_autoencoder_loss(device: torch.device) -> bool:
    """Whether the backend for tensors on `device` has kernels of autoencoder_loss."""
    return pick(device) in (*_forward, "reference")


def autoencoder_loss(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    centred: Tensor | None = None,
    relu: bool = True,
    prefixes: Sequence[int] | None = None,
) -> tuple[SAEError, Tensor]:
    """sae_loss and values, of a code values = W_enc[indices] . (x - b_dec) + b_enc that was chosen without autograd.

    x [N, d_in], a constant; values, indices [N, k]; W_enc, W_dec [d_sae, d_in]; b_enc [d_sae]; b_dec [d_in].
    Differentiable in the parameters: all their gradients come from one order of the entries, and that of the values is
    never written. relu: slots whose value is 0 pass none. The values returned are the same with the encoder's graph,
    for further terms of a loss.

    centred [N, d_in]: x - b_dec, where it is at hand, as in 16 bits it should be: without it W_enc's gradient is that
    for x, rounded, less what b_dec makes of it.
    """
    ends = _checked_prefixes("autoencoder_loss", prefixes, values.shape[-1])
    tensors = (x, centred, values, indices, W_enc, b_enc, W_dec, b_dec)
    errors, residual, values = _AutoencoderLoss.apply(*tensors, relu, ends, pick(x.device))
    return _shaped(errors, residual, x, prefixes), values


def _check_x(op: str, x: object, values: Tensor, W_dec: Tensor) -> None:
    _checks.tensor(op, "x", x)
    if x.shape != (*values.shape[:-1], W_dec.shape[1]):
        shapes = f"x {tuple(x.shape)} must be {(*values.shape[:-1], W_dec.shape[1])}"
        raise ValueError(f"{op}: {shapes}: the rows of values and d_out of W_dec")
    _checks.floating(op, W_dec=W_dec, x=x)


def _checked_prefixes(op: str, prefixes: Sequence[int] | None, k: int) -> list[int]:
    if prefixes is None:
        return [k]
    ends = list(prefixes)
    for end in ends:
        _checks.integer(op, "prefixes", end, 1, k)
    if not ends or ends[-1] != k or any(a >= b for a, b in pairwise(ends)):
        raise ValueError(f"{op}: prefixes must ascend and end with k = {k}, got {ends}")
    return ends


def _shaped(errors: Tensor, residual: Tensor, x: Tensor, prefixes: Sequence[int] | None) -> SAEError:
    if prefixes is None:
        return SAEError(errors.reshape(x.shape[:-1]), residual.reshape(x.shape))
    return SAEError(errors.reshape(*x.shape[:-1], len(prefixes)), residual.reshape(x.shape))


def _from_decode(x, values, indices, W_dec, b_dec, prefixes) -> tuple[Tensor, Tensor]:
    """On a backend without kernels of this op: a reconstruction per prefix, by its sparse_decode."""
    off = [sparse_decode(values[..., :end], indices[..., :end], W_dec, b_dec) - x for end in prefixes]
    errors = [part.to(reference.accumulator(x.dtype)).square().sum(-1) for part in off]
    return torch.stack(errors, -1), off[-1].detach()


def _run_forward(backend: str, x, values, indices, W_dec, b_dec, prefixes) -> tuple[Tensor, Tensor]:
    kernel = _forward.get(backend, _plain_forward)
    arguments = (x, values, indices, W_dec, b_dec, prefixes)
    return naming_bad_indices("sae_loss", kernel, indices, W_dec.shape[0], *arguments)


def _gradient_rows(ctx, grad_errors: Tensor, residual: Tensor, *code: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradient of what was decoded: rows [N, P, d] and a factor [N] for them, or None for 1."""
    if len(ctx.prefixes) == 1:
        return residual.unsqueeze(1), 2 * grad_errors.squeeze(1)
    make = _prefix_grads.get(ctx.backend, _plain_prefix_grads)
    return make(grad_errors.contiguous(), residual, *code, ctx.prefixes), None


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(x, values, indices, W_dec, b_dec, prefixes, backend):
        return _run_forward(backend, x, values, indices, W_dec, b_dec, prefixes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, values, indices, W_dec, _, ctx.prefixes, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(values, indices, W_dec, output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_errors, _):
        values, indices, W_dec, residual = ctx.saved_tensors
        rows, scale = _gradient_rows(ctx, grad_errors, residual, values, indices, W_dec)
        dx = dvalues = dW = db = None
        if any(ctx.needs_input_grad[1:]):
            backward = _backward.get(ctx.backend, _plain_backward)
            dvalues, dW, db, _, _ = backward(rows, scale, values, indices, W_dec, ctx.prefixes, None, None, None, False)
        if ctx.needs_input_grad[0]:
            dx = -rows[:, 0] if scale is None else (-scale.unsqueeze(-1) * rows[:, 0]).to(residual.dtype)
        wanted = ctx.needs_input_grad
        return (
            dx,
            dvalues if wanted[1] else None,
            None,
            dW if wanted[3] else None,
            db if wanted[4] else None,
            None,
            None,
        )


class _AutoencoderLoss(torch.autograd.Function):
    @staticmethod
    def forward(x, centred, values, indices, W_enc, b_enc, W_dec, b_dec, relu, prefixes, backend):
        errors, residual = _run_forward(backend, x, values, indices, W_dec, b_dec, prefixes)
        return errors, residual, values.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, centred, values, indices, W_enc, _, W_dec, b_dec, ctx.relu, ctx.prefixes, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        seen, centre = (x, b_dec) if centred is None else (centred, None)
        ctx.save_for_backward(seen, centre, values, indices, W_enc, W_dec, output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_errors, _, grad_values):
        seen, centre, values, indices, W_enc, W_dec, residual = ctx.saved_tensors
        if grad_errors is None:
            wide = reference.accumulator(residual.dtype)
            grad_errors = residual.new_zeros(residual.shape[0], len(ctx.prefixes), dtype=wide)
        rows, scale = _gradient_rows(ctx, grad_errors, residual, values, indices, W_dec)
        _, dW_dec, db_dec, dW_enc, db_enc = _backward.get(ctx.backend, _plain_backward)(
            rows, scale, values, indices, W_dec, ctx.prefixes, seen, centre, grad_values, ctx.relu
        )
        wanted = ctx.needs_input_grad[4:8]
        if wanted[3]:
            with _autocast.switched_off(W_enc.device):
                db_dec = db_dec - db_enc @ W_enc  # b_dec is the encoder's centre too
        grads = (dW_enc, db_enc, dW_dec, db_dec)
        return *[None] * 4, *(g if w else None for g, w in zip(grads, wanted, strict=True)), None, None, None


def _triton_forward(x, values, indices, W_dec, b_dec, prefixes):
    from ..kernels import sae_loss as kernel

    return kernel.sae_loss(x, values, indices, W_dec, b_dec, prefixes)


def _triton_prefix_grads(grad_errors, residual, values, indices, W_dec, prefixes):
    from ..kernels import sae_loss as kernel

    return kernel.prefix_grads(grad_errors, residual, values, indices, W_dec, prefixes)


def _triton_backward(grad, scale, values, indices, W_dec, prefixes, x, centre, more, relu):
    from ..kernels import sae_loss as kernel

    return kernel.backward(grad, scale, values, indices, W_dec, prefixes, x, centre, more, relu)


_plain_forward = _autocast.unaffected(reference.sae_loss)


@_autocast.unaffected
def _plain_prefix_grads(grad_errors, residual, values, indices, W_dec, prefixes):
    off, found = residual.to(grad_errors.dtype), []
    total = torch.zeros_like(off)
    for start, end in reversed(list(pairwise([0, *prefixes]))):
        total = total + 2 * grad_errors[:, len(prefixes) - len(found) - 1, None] * off
        found.append(total)
        part = values[:, start:end].to(off.dtype), indices[:, start:end], W_dec.to(off.dtype)
        off = off - reference.sparse_decode(*part, None)
    return torch.stack(found[::-1], dim=1).to(residual.dtype)


@_autocast.unaffected
def _plain_backward(grad, scale, values, indices, W_dec, prefixes, x, centre, more, relu):
    acc = reference.accumulator(W_dec.dtype)
    grad = grad.to(acc) if scale is None else grad.to(acc) * scale[:, None, None]
    dvalues, dW = [], torch.zeros_like(W_dec, dtype=acc)
    for p, (start, end) in enumerate(pairwise([0, *prefixes])):
        index = indices[:, start:end]
        dvalues.append((grad[:, p] @ W_dec.to(acc).mT).gather(-1, index.long()))
        dW += reference.dense_codes(values[:, start:end].to(acc), index, W_dec.shape[0]).mT @ grad[:, p]
    dvalues, db = torch.cat(dvalues, 1), grad[:, 0].sum(0)
    if x is None:
        nothing = W_dec.new_empty(0, 0), W_dec.new_empty(0)
        return dvalues.to(values.dtype), dW.to(W_dec.dtype), db.to(W_dec.dtype), *nothing
    dvalues = dvalues if more is None else dvalues + more.to(acc)
    codes = reference.dense_codes(torch.where(values == 0, 0, dvalues) if relu else dvalues, indices, W_dec.shape[0])
    shifted = x.to(acc) if centre is None else x.to(acc) - centre.to(acc)
    grads = (dW, db, codes.mT @ shifted, codes.sum(0))
    return values.new_empty(0, values.shape[1]), *(g.to(W_dec.dtype) for g in grads)


for _name, _kernel, _plain in (
    ("", _triton_forward, _plain_forward),
    ("_prefix_grads", _triton_prefix_grads, _plain_prefix_grads),
    ("_backward", _triton_backward, _plain_backward),
):
    _lib.impl(f"sae_loss_triton{_name}", triton_or(_kernel, _plain), "CompositeExplicitAutograd")
